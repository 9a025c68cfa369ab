"""Compressed request bodies, decompressed up to a limit.

The SDK compresses with zstd and writes the size into the frame, so a bomb is refused from its
header. A frame without a size is first counted, in parts, and only then decompressed.
"""

from __future__ import annotations

from functools import partial

import zstandard

from futures.errors import PayloadTooLarge
from tinkerapi.api.bodies.bounded import bounded_pieces
from tinkerapi.api.bodies.parsers import too_large_sentence
from training.errors import InvalidRequest

HEADER_BYTES = 18
"""The largest header of a zstd frame."""

_PIECE_BYTES = 256 * 1024

_LEAST_WINDOW = 8 * 1024 * 1024
"""Bytes that every decoder of zstd must allow for its window."""


def decompress_body(body: bytes, encoding: str | None, *, max_bytes: int) -> bytes:
    """The body without its ``Content-Encoding``; None and identity change nothing.

    Raises:
        PayloadTooLarge: It has more than ``max_bytes`` once decompressed. (413)
        InvalidRequest: Another encoding than zstd, or not one whole zstd frame. (400)
    """
    encoding = (encoding or "identity").strip().lower()
    if encoding == "identity":
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        return body
    if encoding != "zstd":
        raise InvalidRequest(
            f"Content-Encoding: {encoding[:40]!r} is not supported; send zstd or nothing"
        )
    # A window is memory too, and never needs to be larger than the limit.
    window = max(_LEAST_WINDOW, 1 << max_bytes.bit_length())
    decompressor = zstandard.ZstdDecompressor(max_window_size=window)
    try:
        size = zstandard.get_frame_parameters(body).content_size
        if size == zstandard.CONTENTSIZE_UNKNOWN:
            return _decompress_unsized(decompressor, body, max_bytes)
        if size > max_bytes:
            raise _too_large(max_bytes)
        return decompressor.decompress(body, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError) as error:
        raise InvalidRequest(f"Content-Encoding: the body is not zstd: {error}") from None


def _decompress_unsized(
    decompressor: zstandard.ZstdDecompressor, body: bytes, max_bytes: int
) -> bytes:
    """Count first: only a frame known to be small enough is decompressed as a whole."""
    with decompressor.stream_reader(body) as reader:
        for _ in bounded_pieces(
            reader,
            max_bytes=max_bytes,
            too_large=partial(_too_large, max_bytes),
            piece_bytes=_PIECE_BYTES,
        ):
            pass
    # The reader above accepts a truncated frame; this one does not.
    frame = decompressor.decompressobj()
    data = frame.decompress(body)
    if not frame.eof:
        raise InvalidRequest("Content-Encoding: the zstd body is cut off")
    if frame.unused_data:
        raise InvalidRequest("Content-Encoding: data after the end of the zstd frame")
    return data


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(too_large_sentence(max_bytes, when=" once decompressed"))


def decompressed_head(head: bytes, encoding: str | None, *, max_bytes: int) -> bytes:
    """The first bytes of a body of which only the beginning is known, without its
    ``Content-Encoding``, as far as they can be decompressed."""
    encoding = (encoding or "identity").strip().lower()
    if encoding == "identity":
        return head[:max_bytes]
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LEAST_WINDOW)
    try:
        with decompressor.stream_reader(head) as reader:
            return reader.read(max_bytes)
    except (zstandard.ZstdError, MemoryError):
        return b""


def claimed_size(beginning: bytes) -> int | None:
    """The decompressed size that a zstd frame states in its first ``HEADER_BYTES``; None if it
    states none, and 0 if this is no frame."""
    try:
        size = zstandard.get_frame_parameters(beginning).content_size
    except zstandard.ZstdError:
        return 0
    return None if size == zstandard.CONTENTSIZE_UNKNOWN else size
