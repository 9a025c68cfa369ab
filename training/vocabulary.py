"""Tokens as text outside the worker: a table of each token's bytes, stored once by the worker.

Pages show tokens without loading a tokenizer. Characters are put together from bytes, so those that
several tokens share are right; a single token of a character shows U+FFFD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from futures.payload import decode, encode
from training.models import Vocabulary


@dataclass(frozen=True)
class TokenTable:
    """The bytes of a base model's tokens, by id."""

    key: str
    """Changes if the tokens do."""
    tokens: Sequence[bytes]

    def text(self, ids: Iterable[int]) -> str:
        """The text of consecutive tokens, special tokens written out; an unknown id adds none."""
        known = (self.tokens[id_] for id_ in ids if 0 <= id_ < len(self.tokens))
        return b"".join(known).decode(errors="replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token by itself. A character of several tokens is in the last of them,
        and the others are empty, so that the pieces make the text."""
        pieces: list[str] = []
        pending = b""
        for id_ in ids:
            pending += self.tokens[id_] if 0 <= id_ < len(self.tokens) else b""
            complete = _complete_length(pending)
            pieces.append(pending[:complete].decode(errors="replace"))
            pending = pending[complete:]
        if pending and pieces:
            pieces[-1] += pending.decode(errors="replace")
        return pieces


def vocabulary_store(queue: str, key: str, make: Callable[[], list[bytes]]) -> TokenTable:
    """A base model's table, made and stored only if that of this key is not stored yet.

    Args:
        key: Changes if the tokens do.
    """
    if (stored := vocabulary_find(queue)) is not None and stored.key == key:
        return stored
    tokens = make()
    fields = {"fingerprint": key, "data": encode(tokens)}
    Vocabulary.objects.update_or_create(queue=queue, defaults=fields)
    return TokenTable(key, tokens)


def vocabulary_find(queue: str) -> TokenTable | None:
    """A base model's table; None until its worker has stored it. Kept in memory."""
    row = Vocabulary.objects.filter(queue=queue).values_list("fingerprint", flat=True).first()
    return None if row is None else _read(queue, row)


@lru_cache(maxsize=4)
def _read(queue: str, fingerprint: str) -> TokenTable | None:
    data = Vocabulary.objects.filter(queue=queue).values_list("data", flat=True).first()
    return None if data is None else TokenTable(fingerprint, decode(bytes(data)))


def _complete_length(data: bytes) -> int:
    """The number of bytes before an unfinished UTF-8 character at the end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            return len(data)
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if needed > back else len(data)
    return len(data)
