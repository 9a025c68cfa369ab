"""When a sequence has said one of its stop strings, wherever the tokens' edges lie.

A stop string is looked for in the text, so the tokens of a sequence become text as they come:
``StreamedText`` gives out what is certain (half a character is not), ``StopScanner`` finds the
first stop string in it, reading every character once or a few times but never from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""What decoding gives for bytes that are not a character, or not yet."""

CONTEXT_TOKENS = 8
"""Tokens decoded again in front of new ones: the text of a token can depend on those before."""

MOST_TOKENS = 32
"""Tokens decoded at once; by then bytes that still are no character never will be one."""


class StreamedText:
    """The text of a growing list of tokens, in pieces."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """``decode``: tokens as text, without special tokens."""
        self._decode = decode
        self._start = 0
        self._num_given = 0  # characters of the text of tokens[start:] that were given out

    def next_piece(self, tokens: Sequence[int]) -> str:
        """What the tokens since the last piece add; empty while a character is half there.

        Args:
            tokens: All of the sequence's tokens so far.
        """
        text = self._decode(tokens[self._start :])
        num_tokens = len(tokens) - self._start
        certain = text if num_tokens >= MOST_TOKENS else text.rstrip(UNFINISHED)
        piece = certain[self._num_given :]
        self._num_given = max(self._num_given, len(certain))
        if num_tokens > 2 * CONTEXT_TOKENS and certain == text:
            self._start = len(tokens) - CONTEXT_TOKENS
            self._num_given = len(self._decode(tokens[self._start :]))
        return piece


class StopScanner:
    """Finds the stop string that is complete first in a text that comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        """``stops``: none of them empty."""
        self._stops = stops
        self._overlap = max(map(len, stops)) - 1
        self._tail = ""
        self.num_passed = 0
        """Characters from the start in which no stop string begins."""

    def find(self, piece: str) -> int | None:
        """Where the stop string that this piece completes begins, in characters from the start.

        Of several the one that ends first counts, and of those that end there the longest. None
        if there is none; after a find the scanner is of no more use.
        """
        text = self._tail + piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at = min(ends)
            return self.num_passed + at
        # A stop string that begins in here may be completed by the next piece.
        cut = max(0, len(text) - self._overlap)
        self.num_passed += cut
        self._tail = text[cut:]
        return None


class TextSoFar:
    """The certain text of a growing list of tokens, for who looks at it now and then."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._stream = StreamedText(decode)
        self._num_read = 0
        self._text = ""

    def read(self, tokens: Sequence[int]) -> str:
        """The text of all of the sequence's tokens so far, without half a character at its end."""
        for count in range(self._num_read + 1, len(tokens) + 1):  # one by one: see MOST_TOKENS
            self._text += self._stream.next_piece(tokens[:count])
        self._num_read = len(tokens)
        return self._text


class StopWatch:
    """One sequence's text so far, watched for stop strings."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        self._stream = StreamedText(decode)
        self._scanner = StopScanner(stops)
        self._text = ""
        self.text_before_stop: str | None = None
        """The text up to the stop string, once there is one."""

    def has_stopped(self, tokens: Sequence[int]) -> bool:
        """Whether the sequence's tokens, the newest included, contain a stop string."""
        piece = self._stream.next_piece(tokens)
        self._text += piece
        at = self._scanner.find(piece)
        if at is not None:
            self.text_before_stop = self._text[:at]
        return at is not None

    @property
    def certain_text(self) -> str:
        """The text in which no stop string can begin any more."""
        return self._text[: self._scanner.num_passed]
