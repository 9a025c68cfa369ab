"""Payloads and results as bytes: msgpack with numpy arrays, in zstd.

The form is canonical (mapping keys sorted), so equal values have equal bytes and one
digest tells a repeated request from a reused number. Nothing here can execute: arrays are a
dtype from a short list, a shape and little-endian C bytes. Tuples come back as lists.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Self

import msgpack
import numpy as np
import zstandard

from futures.errors import PayloadTooLarge

MAX_BYTES = 256 * 1024 * 1024
"""Largest value, before compression, that is stored or read, unless the caller sets a lower
limit."""

_ZSTD_LEVEL = 1  # half the CPU of level 3 for the same size on token arrays
_ARRAY = 1  # msgpack extension code
_ALIGNMENT = 16  # bytes; an array's data begins at a multiple of it
_WORTH_A_STREAM = 64 * 1024  # bytes; less is copied together and compressed in one call
_KINDS = "biuf"  # numpy's letters for booleans, integers and floats


@dataclass(frozen=True, slots=True)
class EncodedPayload:
    """A request ready to be stored."""

    data: bytes
    """Input for ``decode``."""
    digest: bytes
    """SHA-256 of the kind and the value."""


def encode(value: Any) -> bytes:
    """Encode ``value``: None, bool, int, float, str, bytes, lists, str-keyed dicts, arrays.

    Raises:
        PayloadTooLarge: It has more than ``MAX_BYTES`` before compression.
        TypeError: It contains a value of another type.
    """
    return Packer().pack(value).compressed()


def decode(data: bytes, *, max_bytes: int = MAX_BYTES) -> Any:
    """Decode what ``encode`` made; arrays come back as read-only numpy arrays.

    Raises:
        PayloadTooLarge: It would be larger than ``max_bytes`` once decompressed; found
            from the frame's header, before memory is taken.
        ValueError: It is not a payload.
    """
    try:
        size = zstandard.get_frame_parameters(data).content_size
        if size == zstandard.CONTENTSIZE_UNKNOWN:
            raise ValueError("its header does not state its size")
        if size > max_bytes:
            raise PayloadTooLarge
        packed = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
        return msgpack.unpackb(packed, ext_hook=_unpack_array, strict_map_key=True)
    except (zstandard.ZstdError, ValueError, TypeError) as error:
        raise ValueError(f"not a payload: {error}") from None


def digest(kind: str, value: Any) -> bytes:
    """SHA-256 of a kind and a value; equal values have equal digests, whatever their key order."""
    return Packer().pack(value).digest(kind)


def encode_payload(kind: str, value: Any, *, named: Any = None) -> EncodedPayload:
    """``encode`` and ``digest`` in one, packing the value once.

    Args:
        named: The value to digest, if an earlier version stored the same request in another
            form; None, or the same object, means ``value``.
    """
    packed = Packer().pack(value)
    if named is None or named is value:
        return packed.encoded(kind)
    return EncodedPayload(packed.compressed(), Packer().pack(named).digest(kind))


class Packer:
    """Writes a value in msgpack, with sorted mappings and with arrays as msgpack extensions."""

    def __init__(self) -> None:
        self._complete: list[bytes | memoryview] = []
        """Packed bytes alternating with the memory of arrays."""
        self._packer = msgpack.Packer(autoreset=False, strict_types=True)

    def pack(self, value: Any) -> Self:
        """Write ``value`` after what was written before."""
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                raise TypeError("the keys of a payload's mappings must be strings")
            self._packer.pack_map_header(len(value))
            for key in sorted(value):
                self._packer.pack(key)
                self.pack(value[key])
        elif isinstance(value, np.ndarray):
            self._pack_array(value)
        elif not isinstance(value, list | tuple):
            self._packer.pack(value.item() if isinstance(value, np.generic) else value)
        # Long lists of plain numbers are common, and walking them is expensive.
        elif all(type(item) in (int, float, str) for item in value):
            self._packer.pack(list(value))
        else:
            self._packer.pack_array_header(len(value))
            for item in value:
                self.pack(item)
        return self

    def _pack_array(self, array: np.ndarray[Any, Any]) -> None:
        """An extension: dtype and shape, padded, and the bytes in C order, uncopied if possible."""
        if array.dtype.kind not in _KINDS:
            raise TypeError(f"arrays of {array.dtype} cannot be stored")
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        header: bytes = msgpack.packb([little.dtype.str, list(array.shape)])
        begin = -(-(1 + len(header)) // _ALIGNMENT) * _ALIGNMENT
        prefix = (bytes([len(header)]) + header).ljust(begin, b"\0")
        numbers = little.reshape(-1).view(np.uint8).data
        extension = _extension_header(begin + len(numbers)) + prefix
        self._complete += [self._packer.bytes(), extension, numbers]
        self._packer.reset()

    def encoded(self, kind: str) -> EncodedPayload:
        """What was written, as a request of this kind."""
        return EncodedPayload(self.compressed(), self.digest(kind))

    def digest(self, kind: str) -> bytes:
        """SHA-256 of a kind and of what was written."""
        digest = hashlib.sha256(kind.encode() + b"\0")
        for piece in self._pieces():
            digest.update(piece)
        return digest.digest()

    def compressed(self) -> bytes:
        """What was written, as one zstd frame that states its size."""
        pieces = self._pieces()
        size = sum(map(len, pieces))
        compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        if size < _WORTH_A_STREAM:
            return compressor.compress(b"".join(pieces))
        stream = compressor.compressobj(size=size)
        return b"".join([*map(stream.compress, pieces), stream.flush()])

    def _pieces(self) -> list[bytes | memoryview]:
        pieces = [*self._complete, self._packer.bytes()]
        if sum(map(len, pieces)) > MAX_BYTES:
            raise PayloadTooLarge
        return pieces


def _extension_header(length: int) -> bytes:
    """The msgpack header of an extension of this many bytes, in the shortest form."""
    if length == 16:  # of the fixed lengths the only one that a prefix leaves possible
        return bytes([0xD8, _ARRAY])
    for format_code, num_bytes in ((0xC7, 1), (0xC8, 2), (0xC9, 4)):
        if length < 256**num_bytes:
            return bytes([format_code]) + length.to_bytes(num_bytes, "big") + bytes([_ARRAY])
    raise PayloadTooLarge


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
