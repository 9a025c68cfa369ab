"""How many protobuf fields a request has, counted before the library makes objects of them.

A message of two bytes becomes an object of about sixty, so a body well within the byte limit
could take thirty times as much memory. The scan reads tags and lengths only; the library
refuses anything malformed.
"""

from __future__ import annotations

from training.errors import InvalidRequest, LimitExceeded

MAX_FIELDS = 500_000
"""About 30 MB of objects. A datum with one text chunk and three inputs has 21 fields."""

_LENGTH_DELIMITED = 2
_PACKED_SHAPE = 4  # of a Tensor: eight bytes of memory for each byte
_FIXED_BYTES = {1: 8, 5: 4}  # wire type to size

_Messages = dict[int, "_Messages"]  # field number of a nested message -> its own

_SPAN: _Messages = {1: {}, 2: {}}
_TENSOR: _Messages = {2: {}}
_CHUNK: _Messages = {1: {}, 2: {4: {}}, 3: {}}
_DATUM: _Messages = {1: _CHUNK, 2: {2: _TENSOR}, 3: _SPAN, 4: _SPAN}
_REQUEST: _Messages = {3: _DATUM, 5: {}, 7: {2: {}}}  # ForwardBackwardRequest


def check_field_count(body: bytes, max_fields: int = MAX_FIELDS) -> None:
    """Refuse a ``ForwardBackwardRequest`` of more than ``max_fields`` fields.

    Raises:
        LimitExceeded: It has more. (400)
        InvalidRequest: It has a field of a kind that the request cannot have. (400)
    """
    num_fields = 0
    # Regions still to read; the rest of an entered region is below it on the stack.
    stack = [(0, len(body), _REQUEST)]
    while stack:
        at, end, messages = stack.pop()
        while at < end:
            num_fields += 1
            if num_fields > max_fields:
                raise _too_many(max_fields)
            tag = body[at]
            at += 1
            if tag & 0x80:
                tag, at = _rest_of_varint(body, at, end, tag & 0x7F)
            wire_type = tag & 7
            if wire_type == _LENGTH_DELIMITED:
                if at >= end:
                    return
                size = body[at]
                at += 1
                if size & 0x80:
                    size, at = _rest_of_varint(body, at, end, size & 0x7F)
                if size > end - at:
                    return
                nested = messages.get(tag >> 3)
                if nested is not None:
                    stack.append((at + size, end, messages))
                    end, messages = at + size, nested
                else:
                    at += size
                    if messages is _TENSOR and tag >> 3 == _PACKED_SHAPE:
                        num_fields += size
                        if num_fields > max_fields:
                            raise _too_many(max_fields)
            elif wire_type == 0:
                while at < end and body[at] & 0x80:
                    at += 1
                at += 1
            elif wire_type in _FIXED_BYTES:
                at += _FIXED_BYTES[wire_type]
            else:  # A group: no message has one, and its fields would not be counted.
                raise InvalidRequest("body: not a ForwardBackwardRequest")


def _too_many(max_fields: int) -> LimitExceeded:
    return LimitExceeded(
        f"body: more than {max_fields} protobuf fields; send the data in several requests, and "
        "the tokens of a datum in one chunk"
    )


def _rest_of_varint(body: bytes, at: int, end: int, value: int) -> tuple[int, int]:
    """The number whose first seven bits were read, and where it ends."""
    shift = 7
    while at < end and shift < 70:
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            break
        shift += 7
    return value, at
