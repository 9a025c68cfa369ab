"""Texts and JSON values in a form that the database can store and every answer can show.

Clients' values appear in error texts and summaries: names with U+0000, which Postgres refuses;
numbers beyond 64 bits and unlimited nesting, which JSON writers refuse. A row that cannot be
written would end the worker, and one that cannot be shown would break every list that contains it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import orjson

MAX_TEXT = 4000
"""Characters of an error text; longer ones lose their middle."""

MAX_DEPTH = 32
"""Lists and objects within each other."""

_BITS_64 = range(-(2**63), 2**64)

# Controls other than tabs and line ends, characters that change text direction, surrogates.
_UNSHOWABLE = re.compile("[\0-\b\v-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain_text(text: str, max_characters: int = MAX_TEXT) -> str:
    r"""The text with unprintable characters written as ``\u0000``, and cut."""
    half = max_characters // 2
    if len(text) > max_characters:
        text = f"{text[:half]} … {text[-half:]}"
    return _UNSHOWABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def plain_json(value: Any, *, depth: int = MAX_DEPTH) -> Any:
    """The value, with everything that JSON cannot express replaced by the closest value.

    Integers beyond 64 bits become floats, as JSON readers take them; NaN and infinity become null;
    values deeper than ``depth`` become an ellipsis. Values of other types are unchanged.
    """
    if isinstance(value, str):
        return plain_text(value, max_characters=max(len(value), MAX_TEXT))
    if isinstance(value, Mapping):
        if depth == 0:
            return "…"
        return {
            plain_json(str(name)): plain_json(item, depth=depth - 1) for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain_json(item, depth=depth - 1) for item in value] if depth else "…"
    if type(value) is int and value not in _BITS_64:
        try:
            return float(value)
        except OverflowError:
            return None
    if type(value) is float and not math.isfinite(value):
        return None
    return value


def to_jsonb(value: Any) -> str:
    """JSON text that Postgres accepts as ``jsonb``, whatever the value contains."""
    try:
        text = orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        text = orjson.dumps(plain_json(value)).decode()
    return text if "\\u0000" not in text else orjson.dumps(plain_json(value)).decode()
