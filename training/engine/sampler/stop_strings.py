"""Finds stop strings in a sequence's text, independently of token boundaries.

Stop strings are searched in the text, so the tokens of a sequence are decoded as they arrive
(``renderer.streamed_text``). ``StopScanner`` finds the first stop string in that text, reading
every character once or a few times but never from the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from training.engine.renderer.streamed_text import Decode, StreamedText


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
        """The offset of the stop string that this piece completes, in characters from the start.

        Of several, the one that ends first counts, and of those that end there the longest. None
        if there is none; after a match the scanner must not be used again.
        """
        text = self._tail + piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at = min(ends)
            return self.num_passed + at
        # A stop string that begins here may be completed by the next piece.
        cut = max(0, len(text) - self._overlap)
        self.num_passed += cut
        self._tail = text[cut:]
        return None


class StopWatch:
    """One sequence's text so far, watched for stop strings.

    The client's text has no special tokens, but a stop string may contain
    one, alone or with text around it, so the watched text has them written out.
    """

    def __init__(
        self,
        decode: Decode,
        stops: Sequence[str],
        *,
        before: Sequence[int] = (),
        special_texts: Mapping[int, str] | None = None,
    ) -> None:
        """
        Args:
            before: See ``StreamedText``.
            special_texts: The texts of special tokens.
        """
        self._stream = StreamedText(decode, before)
        self._scanner = StopScanner(stops)
        self._special_texts = special_texts or {}
        self._watched = ""
        self._special_spans: list[tuple[int, int]] = []
        self.text_before_stop: str | None = None
        """The text up to the stop string, once there is one."""

    def has_stopped(self, tokens: Sequence[int]) -> bool:
        """Whether the sequence's tokens, the newest included, contain a stop string."""
        piece = self._stream.next_piece(tokens)
        special = self._special_texts.get(tokens[-1], "")
        if special:
            begin = len(self._watched) + len(piece)
            self._special_spans.append((begin, begin + len(special)))
        self._watched += piece + special
        at = self._scanner.find(piece + special)
        if at is None:
            return False
        self.text_before_stop = self._text_up_to(at)
        if special and at == len(self._watched) - len(special):
            # An incomplete character before the special token stays incomplete.
            self.text_before_stop += self._stream.next_piece(tokens, is_last=True)
        return True

    @property
    def certain_text(self) -> str:
        """The text in which no stop string can begin any more."""
        return self._text_up_to(self._scanner.num_passed)

    def _text_up_to(self, end: int) -> str:
        """The client's part of the first ``end`` watched characters."""
        kept, begin = "", 0
        for special_begin, special_end in self._special_spans:
            kept += self._watched[begin : min(special_begin, end)]
            begin = min(special_end, end)
        return kept + self._watched[begin:end]
