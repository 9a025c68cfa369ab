"""Hostile values as JSON text; some of them no JSON writer would produce."""

from __future__ import annotations

import json
from collections.abc import Mapping

NESTED = 300
LONG = 10 * 1024 * 1024

VALUES: Mapping[str, str] = {
    # Text
    "empty text": '""',
    "U+0000": '"\\u0000"',
    "U+0000 inside": '"a\\u0000b"',
    "half a surrogate pair": '"\\ud800"',
    "two halves, reversed": '"\\udfff\\ud800"',
    "raw control character": '"\x01"',
    "escapes and directions": '"\\u202e\\n\\r\\u001b[31m\\u2028"',
    "looks like an escape": '"\\\\u0000 \\\\x00"',
    "outside the BMP": '"\\ud83d\\ude00"',
    "the first moment": '"0001-01-01T00:00:00+14:00"',
    "the last moment": '"9999-12-31T23:59:59-14:00"',
    "a number as text": '"1"',
    "a path up": '"../../x"',
    "long text": json.dumps("x" * LONG),
    # Numbers
    "-1": "-1",
    "0": "0",
    "-0.0": "-0.0",
    "1.5": "1.5",
    "2^31": str(2**31),
    "2^63": str(2**63),
    "2^64": str(2**64),
    "-2^63 - 1": str(-(2**63) - 1),
    "1e308": "1e308",
    "1e400": "1e400",
    "1e-400": "1e-400",
    "400 digits": "9" * 400,
    "NaN": "NaN",
    "Infinity": "-Infinity",
    # Other kinds
    "null": "null",
    "true": "true",
    "false": "false",
    "empty list": "[]",
    "empty object": "{}",
    "list of null": "[null]",
    "list of lists": "[[1], [2, 3]]",
    "list of texts": '["a", "\\u0000"]',
    "list of 2^64": f"[{2**64}, -1]",
    "object": '{"a": 1}',
    "object named U+0000": '{"\\u0000": 1}',
    "object with a name twice": '{"a": 1, "a": {"a": null}}',
    "deep list": "[" * NESTED + "]" * NESTED,
    "deep object": '{"a":' * NESTED + "1" + "}" * NESTED,
    "deeper than any reader": "[" * 100_000 + "]" * 100_000,
}
"""Replacements of a value; the name is for people."""

NAMES: Mapping[str, str] = {
    "empty name": '""',
    "U+0000": '"\\u0000"',
    "U+0000 inside": '"a\\u0000b"',
    "half a surrogate pair": '"\\ud800"',
    "escapes and directions": '"\\u202e\\n\\u001b[31m"',
    "long name": json.dumps("n" * 100_000),
    "a dunder": '"__class__"',
}
"""Names of fields, besides an object's own."""

TEXTS = (
    "",
    "\0",
    "a\0b",
    "\ud800",
    "\x01\n\x1b[31m",
    "\u202e",
    "-1",
    "0",
    "1.5",
    "\u0663",
    str(2**31),
    str(2**63),
    str(2**64),
    "9" * 400,
    "1e308",
    "NaN",
    "x" * 30_000,
    "%",
    "..",
    "a/b",
    "0001-01-01",
    "0001-01-01T00:00:00+14:00",
    "9999-12-31",
    "9999-12-31T23:00:00-14:00",
    "9999-12-31T23:00:00Z",
    "2026-W01-1",
    "2026-01-01T00:00:00+99:00",
)
"""Values of a part of a path, a query or a header."""
