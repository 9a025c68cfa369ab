"""What an exception of a model's own code says, for an error message."""

from __future__ import annotations

MAX_CHARACTERS = 200


def error_text(error: Exception, *, max_characters: int = MAX_CHARACTERS) -> str:
    """The exception's class and text on one line, cut."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:max_characters]
