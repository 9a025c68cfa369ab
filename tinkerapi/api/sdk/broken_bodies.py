"""Model id and seq id of a body that cannot be read as a whole.

A refused request uses up its number, or the model would wait for it in vain. So it is looked for
even where the rest is no JSON (NaN, half a surrogate pair, nesting without end, an end too early)
or no message. The ids are taken only where they stand once: then there is nothing to guess.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

_JSON_IDS = re.compile(
    rb'(?<!\\)"(model_id|seq_id)"\s*:\s*(?:"([^"\\]{1,200})"|(\d{1,19})(?![\d.eE]))'
)

_MODEL_ID, _SEQ_ID = 1, 2  # a ForwardBackwardRequest's field numbers
_VARINT, _LENGTH_DELIMITED = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}  # wire type to size


def ids_of_broken_json(body: bytes) -> dict[str, Any]:
    """``model_id`` and ``seq_id`` where a body names both once, else nothing."""
    found = [match.groups() for match in islice(_JSON_IDS.finditer(body), 3)]
    ids = {
        name.decode(): int(number) if number else text.decode(errors="replace")
        for name, text, number in found
    }
    return ids if len(ids) == len(found) == 2 else {}


def ids_of_broken_protobuf(body: bytes) -> dict[str, Any]:
    """``model_id`` and ``seq_id`` as far as a message's own fields can be read."""
    ids: dict[str, Any] = {}
    at = 0
    while at < len(body) and (tag_read := _varint(body, at)):
        tag, at = tag_read
        number, wire_type = tag >> 3, tag & 7
        if wire_type in _FIXED_BYTES:
            at += _FIXED_BYTES[wire_type]
            continue
        value_read = _varint(body, at) if wire_type in (_VARINT, _LENGTH_DELIMITED) else None
        if value_read is None:
            break
        value, at = value_read
        if wire_type == _VARINT:
            if number == _SEQ_ID:
                ids["seq_id"] = value
        else:
            if number == _MODEL_ID and at + value <= len(body):
                ids["model_id"] = body[at : at + value].decode(errors="replace")
            at += value
    return ids


def _varint(body: bytes, at: int) -> tuple[int, int] | None:
    """The number that begins here and where it ends; None if it does not end."""
    value = 0
    for shift, byte in enumerate(body[at : at + 10]):
        value |= (byte & 0x7F) << 7 * shift
        if not byte & 0x80:
            return value, at + shift + 1
    return None
