"""Payloads and results as bytes: msgpack with numpy arrays, in zstd.

The form is canonical (mapping keys sorted), so equal values have equal bytes and one
digest tells a repeated request from a reused number. Nothing here can execute: arrays are a
dtype from a short list, a shape and little-endian C bytes. Tuples come back as lists.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import zstandard

from futures.errors import PayloadTooLarge

MAX_BYTES = 256 * 1024 * 1024
"""Largest value, before compression, that is stored or read unless the caller says less."""

_ZSTD_LEVEL = 1  # half the CPU of level 3 for the same size on token arrays
_ARRAY = 1  # msgpack extension code
_ALIGNMENT = 16  # bytes; an array's data begins at a multiple of it
_KINDS = "biuf"  # numpy's letters for booleans, integers and floats


@dataclass(frozen=True, slots=True)
class EncodedPayload:
    """A request ready to be stored."""

    data: bytes
    """What ``decode`` reads."""
    digest: bytes
    """SHA-256 of the kind and the value."""


def encode(value: Any) -> bytes:
    """Encode ``value``: None, bool, int, float, str, bytes, lists, str-keyed dicts, arrays.

    Raises:
        PayloadTooLarge: It has more than ``MAX_BYTES`` before compression.
        TypeError: It holds anything else.
    """
    return _compress(_pack(value))


def decode(data: bytes, *, max_bytes: int = MAX_BYTES) -> Any:
    """Decode what ``encode`` made; arrays come back as read-only numpy arrays.

    Raises:
        PayloadTooLarge: It would be larger than ``max_bytes`` once decompressed; found
            from the frame's header, before memory is taken.
        ValueError: It is no payload.
    """
    try:
        size = zstandard.get_frame_parameters(data).content_size
        if size == zstandard.CONTENTSIZE_UNKNOWN:
            raise ValueError("its size is not in its header")
        if size > max_bytes:
            raise PayloadTooLarge
        packed = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
        return msgpack.unpackb(packed, ext_hook=_unpack_array, strict_map_key=True)
    except (zstandard.ZstdError, ValueError, TypeError) as error:
        raise ValueError(f"not a payload: {error}") from None


def digest(kind: str, value: Any) -> bytes:
    """SHA-256 of a kind and a value; equal for equal values whatever their key order."""
    return _digest(kind, _pack(value))


def encode_payload(kind: str, value: Any) -> EncodedPayload:
    """``encode`` and ``digest`` with the value packed once."""
    packed = _pack(value)
    return EncodedPayload(_compress(packed), _digest(kind, packed))


def _digest(kind: str, packed: bytes) -> bytes:
    digest = hashlib.sha256(kind.encode() + b"\0")
    digest.update(packed)
    return digest.digest()


def _compress(packed: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(packed)


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(_canonical(value), strict_types=True)
    if len(packed) > MAX_BYTES:
        raise PayloadTooLarge
    return packed


def _canonical(value: Any) -> Any:
    """``value`` with sorted mappings and with arrays as msgpack extensions."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("the keys of a payload's mappings must be strings")
        return {key: _canonical(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        # Long lists of plain numbers are common, and walking them is what costs.
        if all(type(item) in (int, float, str) for item in value):
            return list(value)
        return [_canonical(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return _pack_array(value)
    return value


def _pack_array(array: np.ndarray[Any, Any]) -> msgpack.ExtType:
    """Header (length, dtype, shape), padding, then the bytes in C order."""
    if array.dtype.kind not in _KINDS:
        raise TypeError(f"arrays of {array.dtype} cannot be stored")
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    header: bytes = msgpack.packb([little.dtype.str, list(array.shape)])
    begin = -(-(1 + len(header)) // _ALIGNMENT) * _ALIGNMENT
    prefix = bytes([len(header)]) + header
    return msgpack.ExtType(_ARRAY, prefix.ljust(begin, b"\0") + little.tobytes())


def _unpack_array(code: int, data: bytes) -> np.ndarray[Any, Any]:
    if code != _ARRAY or not data:
        raise ValueError("unknown extension")
    name, shape = msgpack.unpackb(data[1 : 1 + data[0]])
    dtype = np.dtype(name)
    if dtype.kind not in _KINDS:
        raise ValueError(f"array of {dtype}")
    begin = -(-(1 + data[0]) // _ALIGNMENT) * _ALIGNMENT
    array: np.ndarray[Any, Any] = np.frombuffer(
        data, dtype, count=math.prod(shape), offset=begin if math.prod(shape) else 0
    )
    return array.reshape(shape)
