"""The growing text of a sample, in pieces: the worker sends notes, a web process streams them.

A note may be lost, so a piece repeats some text of earlier ones; the result has any text that
is still missing at the end.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NEW_CHARACTERS = 500
"""Most new characters in one piece. In JSON a character takes up to six bytes, so new and
repeated ones fit into a notification of 8000 bytes."""

REPEATED_CHARACTERS = 500


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """A part of one sequence's text."""

    number: int
    """The sequence's number in the request, those of the first prompt first."""
    begin: int
    """Its offset in the text, in characters."""
    text: str

    def to_note(self) -> str:
        return json.dumps([self.number, self.begin, self.text], ensure_ascii=False)

    @classmethod
    def of_note(cls, note: str) -> TextPiece:
        number, begin, text = json.loads(note)
        return cls(number=number, begin=begin, text=text)

    def after(self, known: str) -> str:
        """The text that the piece adds to a known beginning; nothing if it cannot be joined.

        It cannot if an earlier piece was lost, or if the two contradict each other.
        """
        overlap = len(known) - self.begin
        if overlap < 0 or self.text[:overlap] != known[self.begin :]:
            return ""
        return self.text[overlap:]


class Told:
    """The length of one request's texts that was already sent."""

    def __init__(self) -> None:
        self._ends: dict[int, int] = defaultdict(int)

    def pieces(self, texts: Sequence[str]) -> Iterator[TextPiece]:
        """The pieces to send now, given every sequence's text so far."""
        for number, text in enumerate(texts):
            while (told := self._ends[number]) < len(text):
                begin = max(0, told - REPEATED_CHARACTERS)
                self._ends[number] = min(len(text), told + NEW_CHARACTERS)
                yield TextPiece(number=number, begin=begin, text=text[begin : self._ends[number]])
