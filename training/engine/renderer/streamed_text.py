"""The text of tokens that arrive one after another, independently of token boundaries.

A token may end inside a character, and its text may depend on the tokens before it, so tokens are
decoded together with some earlier ones, and text is returned once it is certain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""The decoded form of bytes that are not, or not yet, a character."""

CONTEXT_TOKENS = 8
"""Tokens decoded again before new ones: a token's text can depend on those before."""

BYTES_OF_A_CHARACTER = 4
"""Most bytes, and so most tokens, of one character."""

BEFORE_TOKENS = CONTEXT_TOKENS + BYTES_OF_A_CHARACTER - 1
"""Enough tokens to start with at least ``CONTEXT_TOKENS`` and not inside a character."""

MOST_TOKENS = 32
"""Tokens decoded at once; of bytes that still are no character by then, only the last ones may
become one."""


Decode = Callable[[Sequence[int]], str]
"""Tokens as text, without special tokens."""


class StreamedText:
    """The text of a growing list of tokens, in pieces."""

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        """
        Args:
            before: The tokens that these follow, such as a prompt; the last ``BEFORE_TOKENS`` are
                enough. Their text is not returned, but without them the first word could lose
                its space.
        """
        self._decode = decode
        self._before, self._text_before = _last_of(decode, before)
        self._start = 0
        self._num_given = 0  # characters of the text of tokens[start:] that were returned

    def next_piece(self, tokens: Sequence[int], *, is_last: bool = False) -> str:
        """The text of the tokens since the last piece; empty while a character is incomplete.

        Args:
            tokens: All of the sequence's tokens so far.
            is_last: No more tokens will come: incomplete characters are returned as they are.
        """
        text = self._text_since_start(tokens)
        num_tokens = len(tokens) - self._start
        held = 0 if is_last else len(text) - len(text.rstrip(UNFINISHED))
        if must_forget := num_tokens >= MOST_TOKENS:
            held = min(held, BYTES_OF_A_CHARACTER - 1)
        certain = text[: len(text) - held]
        piece = certain[self._num_given :]
        self._num_given = max(self._num_given, len(certain))
        if must_forget or (num_tokens > 2 * CONTEXT_TOKENS and not held):
            self._forget(tokens, text, held, must=must_forget)
        return piece

    def _text_since_start(self, tokens: Sequence[int]) -> str:
        """The text of tokens[start:], without that of earlier tokens."""
        if self._start or not self._before:
            return self._decode(tokens[self._start :])
        text = self._decode([*self._before, *tokens])
        if text.startswith(self._text_before):
            return text[len(self._text_before) :]
        # The tokens complete a character, or continue an incomplete one.
        return text[len(self._text_before.rstrip(UNFINISHED)) :]

    def _forget(self, tokens: Sequence[int], text: str, held: int, *, must: bool) -> None:
        """Move the start, but not into a character: its bytes would corrupt those after them.

        Args:
            held: Characters at the end of the text that were not returned.
        """
        latest = len(tokens) - CONTEXT_TOKENS
        for start in range(latest, latest - BYTES_OF_A_CHARACTER, -1):
            kept = self._decode(tokens[start:])
            if len(kept) >= held and text.endswith(kept):
                self._start, self._num_given = start, len(kept) - held
                return
        if must:
            self._start = latest
            self._num_given = max(0, len(self._decode(tokens[latest:])) - held)


def text_after(decode: Decode, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that tokens add to that of those before; equals the pieces of ``StreamedText``."""
    last, base = _last_of(decode, before)
    whole = decode([*last, *tokens])
    if UNFINISHED not in whole and whole.startswith(base):
        return whole[len(base) :]
    # Some tokenizers corrupt a whole run of bytes because of one wrong byte; the pieces do not.
    stream = StreamedText(decode, before)
    pieces = [stream.next_piece(tokens[:count]) for count in range(1, len(tokens) + 1)]
    return "".join(pieces) + stream.next_piece(tokens, is_last=True)


def _last_of(decode: Decode, before: Sequence[int]) -> tuple[list[int], str]:
    """The last tokens of ``before``, from the beginning of a character on, and their text.

    Bytes that begin inside a character can corrupt more than that one: some tokenizers then return
    no character for the whole run of bytes, so text after the cut would be lost too.
    """
    best, text = list(before[-CONTEXT_TOKENS:]), ""
    if best:
        text = decode(best)
    for number in range(CONTEXT_TOKENS + 1, BEFORE_TOKENS + 1):
        if UNFINISHED not in text or len(before) < number:
            break
        longer = list(before[-number:])
        if (text_of_longer := decode(longer)).count(UNFINISHED) < text.count(UNFINISHED):
            best, text = longer, text_of_longer
    return best, text


class TextSoFar:
    """The certain text of a growing list of tokens, for occasional reads."""

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        """``before``: see ``StreamedText``."""
        self._stream = StreamedText(decode, before)
        self._num_read = 0
        self._text = ""

    def read(self, tokens: Sequence[int]) -> str:
        """The text of all of the sequence's tokens so far, without an incomplete character at its
        end."""
        for count in range(self._num_read + 1, len(tokens) + 1):  # one by one: see MOST_TOKENS
            self._text += self._stream.next_piece(tokens[:count])
        self._num_read = len(tokens)
        return self._text
