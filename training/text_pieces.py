"""The text of a sample while it grows, in pieces: the worker notes them, a web process sends them.

A note may be lost, so a piece repeats some of what earlier ones said; what is still missing at
the end, the result has.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NEW_CHARACTERS = 500
"""Of one piece at most. Written out as JSON a character takes up to six bytes, so that new and
repeated ones fit into a notification of 8000 bytes."""

REPEATED_CHARACTERS = 500


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """A stretch of one sequence's text."""

    number: int
    """Which of the request's sequences, those of the first prompt first."""
    begin: int
    """Where it begins in the text, in characters."""
    text: str

    def to_note(self) -> str:
        return json.dumps([self.number, self.begin, self.text], ensure_ascii=False)

    @classmethod
    def of_note(cls, note: str) -> TextPiece:
        number, begin, text = json.loads(note)
        return cls(number=number, begin=begin, text=text)

    def after(self, known: str) -> str:
        """What the piece adds to a known beginning of the text; nothing if it cannot be joined.

        It cannot when a piece before it was lost, or when the two contradict each other.
        """
        overlap = len(known) - self.begin
        if overlap < 0 or self.text[:overlap] != known[self.begin :]:
            return ""
        return self.text[overlap:]


class Told:
    """How much of one request's texts was noted."""

    def __init__(self) -> None:
        self._ends: dict[int, int] = defaultdict(int)

    def pieces(self, texts: Sequence[str]) -> Iterator[TextPiece]:
        """What is to be noted now, given every sequence's text so far."""
        for number, text in enumerate(texts):
            while (told := self._ends[number]) < len(text):
                begin = max(0, told - REPEATED_CHARACTERS)
                self._ends[number] = min(len(text), told + NEW_CHARACTERS)
                yield TextPiece(number=number, begin=begin, text=text[begin : self._ends[number]])
