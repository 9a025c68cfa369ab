"""Errors for refused values, in one form for all dialects: the place, the expected value, the given
one.

``adam_params.beta1: expected a number of at least 0 and below 1; got 1.5``
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from training.errors import InvalidRequest

FLOAT32 = "a number that a float32 can hold"

_HALF = re.compile("[\ud800-\udfff]")


def shown(value: object) -> str:
    """A value for an error message: short, in JSON."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:40] + "…")
    if isinstance(value, int | float):
        return repr(value)[:40]
    return "a list" if isinstance(value, list) else "an object"


def refuse(where: str, expected: str, value: object) -> InvalidRequest:
    """The error for a value of the wrong kind."""
    return InvalidRequest(f"{where}: expected {expected}; got {shown(value)}")


def refuse_size(where: str, size: int, noun: str, most: int) -> InvalidRequest:
    """The error for a list or an object that is too large."""
    return InvalidRequest(f"{where}: {size} {noun}; this server takes at most {most}")


def refuse_unknown(
    given: Iterable[str],
    known: Collection[str],
    where: str = "",
    *,
    of: str = "",
    error: type[InvalidRequest] = InvalidRequest,
) -> None:
    """Refuse the first field of an object that is not known.

    Args:
        where: The object's place; empty for the body.
        of: What the field would be of, for the message: `` of a message of the role user``.

    Raises:
        InvalidRequest: Or ``error``. (400)
    """
    for name in given:
        if name not in known:
            place = f"{where}.{name[:60]}" if where else name[:60]
            raise error(f"{place}: unknown field{of}; expected {', '.join(known) or 'no field'}")


def is_above(value: Any, maximum: int) -> bool:
    """Whether a value is a number, and too large: beyond 64 bits JSON's integers are floats."""
    return type(value) in (int, float) and value > maximum


def check_characters(text: str, where: str) -> str:
    """The text, if the database can hold it.

    Raises:
        InvalidRequest: It contains U+0000 or half a surrogate pair. (400)
    """
    if "\0" in text:
        raise InvalidRequest(f"{where}: may not hold the character U+0000")
    if not text.isascii() and _HALF.search(text):
        raise InvalidRequest(f"{where}: has half a surrogate pair, which is not a character")
    return text


def check_json(value: Any, where: str) -> None:
    """Refuse a value that cannot be stored, naming its place; the body's limits cover nesting.

    Raises:
        InvalidRequest: A text or a name in it cannot be stored. (400)
    """
    if isinstance(value, str):
        check_characters(value, where)
        return
    if not isinstance(value, dict | list):
        return
    if isinstance(value, dict):
        for name in value:
            check_characters(name, f"{where} (a name)")
        places = ((f"{where}.{name[:60]}", item) for name, item in value.items())
    else:
        places = ((f"{where}[{index}]", item) for index, item in enumerate(value))
    for place, item in places:
        check_json(item, place)
