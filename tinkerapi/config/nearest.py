"""The right name for a wrong one."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that refuses ``name``: the known name that is meant, or all of them."""
    choices = sorted(known)
    near = get_close_matches(name, choices, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known are {', '.join(choices)}" if len(choices) < 12 else ""
