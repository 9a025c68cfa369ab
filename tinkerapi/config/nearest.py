"""Suggests the correct name for a misspelt one."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about ``name``: the most similar known name, or all known names."""
    choices = sorted(known)
    near = get_close_matches(name, choices, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known are {', '.join(choices)}" if len(choices) < 12 else ""
