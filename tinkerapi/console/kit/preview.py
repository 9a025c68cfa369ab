"""A decoded payload or result as a few lines of text that a person can read.

The text is small for any value: long lists show their first items, arrays their
shape and first numbers, strings their beginning. The text is not HTML; a template escapes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from futures import payload
from futures.errors import PayloadTooLarge

MAX_BYTES = 64 * 1024 * 1024
"""Larger bodies (decompressed) are not shown."""
MAX_LINES = 80
MAX_ITEMS = 4  # of a list of structures
MAX_KEYS = 24  # of a mapping
MAX_NUMBERS = 10  # of an array or a list of plain values
MAX_CHARACTERS = 240  # of a string
MAX_DEPTH = 6


def body_preview(data: bytes | memoryview) -> str:
    """The lines of a stored payload or result, or one line that says why they cannot be shown."""
    try:
        value = payload.decode(bytes(data), max_bytes=MAX_BYTES)
    except PayloadTooLarge:
        return f"larger than {MAX_BYTES // 1024**2} MiB: not shown"
    except ValueError as error:
        return f"cannot be read: {error}"
    return value_preview(value)


def value_preview(value: Any) -> str:
    """At most ``MAX_LINES`` lines that describe a decoded value."""
    lines = list(islice(_lines("", value, depth=0), MAX_LINES + 1))
    return "\n".join([*lines[:MAX_LINES], "…"] if len(lines) > MAX_LINES else lines)


def _lines(name: str, value: Any, *, depth: int) -> Iterator[str]:
    indent = "  " * (depth - 1)
    if isinstance(value, Mapping) and depth <= MAX_DEPTH:
        if name:
            yield f"{indent}{name}" if value else f"{indent}{name}  {{}}"
        for key in islice(value, MAX_KEYS):
            yield from _lines(_short(str(key)), value[key], depth=depth + 1)
        if len(value) > MAX_KEYS:
            yield f"{indent}  … {len(value) - MAX_KEYS} more"
    elif isinstance(value, list) and depth <= MAX_DEPTH and _holds_structures(value):
        yield f"{indent}{name or 'list'}  {len(value)} items"
        for index, item in enumerate(value[:MAX_ITEMS]):
            yield from _lines(f"[{index}]", item, depth=depth + 1)
        if len(value) > MAX_ITEMS:
            yield f"{indent}  … {len(value) - MAX_ITEMS} more"
    else:
        yield f"{indent}{name}  {_inline(value)}".rstrip() if name else _inline(value)


def _holds_structures(value: list[Any]) -> bool:
    return any(isinstance(item, list | Mapping | np.ndarray) for item in value[:MAX_NUMBERS])


def _inline(value: Any) -> str:
    """One value on one line."""
    if isinstance(value, np.ndarray):
        shape = "x".join(str(length) for length in value.shape) or "scalar"
        first = value.reshape(-1)[:MAX_NUMBERS].tolist()
        return f"{value.dtype} {shape}  {_numbers(first, value.size)}"
    if isinstance(value, list):
        return _numbers(value[:MAX_NUMBERS], len(value))
    if isinstance(value, Mapping):
        return f"{len(value)} fields"
    return _scalar(value)


def _numbers(first: list[Any], count: int) -> str:
    more = f", … {count - len(first)} more" if count > len(first) else ""
    return f"[{', '.join(_scalar(item) for item in first)}{more}]"


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return f'"{_short(value)}"'
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return _short(str(value))


def _short(value: str) -> str:
    """A string on one line, cut with a note of its length."""
    line = value[:MAX_CHARACTERS].replace("\n", "⏎").replace("\r", "")
    cut = len(value) - MAX_CHARACTERS
    return f"{line}… ({cut} more characters)" if cut > 0 else line
