"""Model id and seq id of a body that cannot be read as a whole.

A refused request uses its number; otherwise the model would wait for it in vain. So the ids are
searched even if the rest is not JSON (NaN, half a surrogate pair, unlimited nesting, a truncated
body) or not a message. An id is used only if it occurs once, at least in the outermost object, so
nothing is guessed. The search must be cheap: the body may be large, and may be anything.
"""

from __future__ import annotations

import re
from typing import Any

from tinkerapi.api.bodies.json_limits import outermost

_JSON_ID = re.compile(
    rb'"(model_id|seq_id)"[ \t\r\n]{0,20}:[ \t\r\n]{0,20}'
    rb'(?:"([^"\\]{1,200})"|(\d{1,19})(?![\d.eE]))'
)
_JSON_NAMES = (b'"model_id"', b'"seq_id"')
_MOST_PLACES = 100
"""Occurrences of one name; a body with more of them has no id."""

_MODEL_ID, _SEQ_ID = 1, 2  # a ForwardBackwardRequest's field numbers
_VARINT, _LENGTH_DELIMITED = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}  # wire type to size


def ids_of_broken_json(body: bytes) -> dict[str, Any]:
    """``model_id`` and ``seq_id`` if each occurs once, else nothing."""
    found: dict[int, tuple[str, str | int]] = {}
    for name in _JSON_NAMES:
        for at in _places(body, name):
            match = _JSON_ID.match(body, at)
            if match is not None:
                _, text, number = match.groups()
                value = int(number) if number else text.decode(errors="replace")
                found[at] = (name[1:-1].decode(), value)
    if len(found) > 2:
        found = {at: found[at] for at in outermost(body, sorted(found))}
    ids = dict(found.values())
    return ids if len(ids) == len(found) == 2 else {}


def _places(body: bytes, name: bytes) -> list[int]:
    """The places of a name, except in a text between two escaped quotes."""
    places: list[int] = []
    at = body.find(name)
    while at >= 0 and len(places) <= _MOST_PLACES:
        if body[at - 1 : at] != b"\\":
            places.append(at)
        at = body.find(name, at + len(name))
    return places if len(places) <= _MOST_PLACES else []


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
    """The number that begins here and its end; None if it does not end."""
    value = 0
    for shift, byte in enumerate(body[at : at + 10]):
        value |= (byte & 0x7F) << 7 * shift
        if not byte & 0x80:
            return value, at + shift + 1
    return None
