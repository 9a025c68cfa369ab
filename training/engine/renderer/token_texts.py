"""Single tokens as text: each one's text, offset and bytes.

A token may be a part of a character: then its text has U+FFFD, and only the vocabulary has its
bytes. Byte-level vocabularies write a byte as one printable character, others as ``<0xE2>``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from training.engine.renderer.streamed_text import UNFINISHED, StreamedText
from training.engine.renderer.tokenizer import Tokenizer
from training.types import TokenText


class TokenTexts:
    """The texts of one tokenizer's tokens. Holds no state between calls."""

    def __init__(self, tokenizer: Tokenizer, *, neutral: Sequence[int]) -> None:
        """
        Args:
            neutral: Tokens decoded before a single token, because the first word of a text loses
                its space with some tokenizers.
        """
        self._tokenizer = tokenizer
        self._neutral = list(neutral)
        self._num_neutral = len(self._decode(self._neutral, with_special=True))

    def of_sample(self, tokens: Sequence[int], before: Sequence[int] = ()) -> list[TokenText]:
        """Each token, with its offset in the text that they add to those before, without special
        tokens."""
        return self._placed(tokens, before, with_special=False)

    def bytes_of(self, tokens: Iterable[int]) -> list[bytes]:
        """Each token's bytes by itself, special tokens written out."""
        texts = (self._token(token, 0) for token in tokens)
        return [item.text.encode() if item.utf8 is None else item.utf8 for item in texts]

    def of_prompt(
        self, tokens: Sequence[int], text: str | None = None
    ) -> tuple[str, list[TokenText]]:
        """A prompt's text with special tokens written out, and each token's offset in it.

        Args:
            text: The tokens' original text, if there was one; it is returned unchanged.
        """
        if text is not None:
            encoding = self._tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            added = len(tokens) - len(encoding["input_ids"])  # such as BOS
            if added >= 0 and list(tokens[added:]) == encoding["input_ids"]:
                offsets = [0] * added + [start for start, _ in encoding["offset_mapping"]]
                return text, [
                    self._token(token, offset)
                    for token, offset in zip(tokens, offsets, strict=True)
                ]
        return self._decode(tokens, with_special=True), self._placed(tokens, (), with_special=True)

    def _placed(
        self, tokens: Sequence[int], before: Sequence[int], *, with_special: bool
    ) -> list[TokenText]:
        stream = StreamedText(lambda some: self._decode(some, with_special=with_special), before)
        seen: list[int] = []
        placed: list[TokenText] = []
        offset = 0
        for token in tokens:
            seen.append(token)
            placed.append(self._token(token, offset))
            offset += len(stream.next_piece(seen))
        return placed

    def _token(self, token: int, offset: int) -> TokenText:
        own = self._decode([*self._neutral, token], with_special=True)[self._num_neutral :]
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):  # an id without a token
            return TokenText(own, offset, own.encode())
        return TokenText(
            own, offset, _true_bytes(piece, own) if UNFINISHED in own else own.encode()
        )

    def _decode(self, tokens: Sequence[int], *, with_special: bool) -> str:
        text = self._tokenizer.decode(
            list(tokens), skip_special_tokens=not with_special, clean_up_tokenization_spaces=False
        )
        return str(text)


def _true_bytes(piece: str, text: str) -> bytes | None:
    """The bytes of a vocabulary's entry whose text has U+FFFD; None if they are unknown."""
    if piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:-1])
    if not all(character in _BYTE_OF for character in piece):
        return None
    found = bytes(_BYTE_OF[character] for character in piece)
    return found if found.decode(errors="replace") == text else None


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte is itself, the others are shifted up in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(moved)
    }


_BYTE_OF = _byte_level_alphabet()
