"""Reads a stream in pieces, up to a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import IO, Protocol

PIECE_BYTES = 64 * 1024


class Readable(Protocol):
    """What a stream needs to be read in pieces."""

    def read(self, size: int, /) -> bytes: ...


def bounded_pieces(
    source: Readable,
    *,
    max_bytes: int,
    too_large: Callable[[], Exception],
    piece_bytes: int = PIECE_BYTES,
) -> Iterator[bytes]:
    """The stream's bytes in pieces; raises ``too_large()`` instead of going beyond the limit."""
    left = max_bytes
    while piece := source.read(piece_bytes):
        left -= len(piece)
        if left < 0:
            raise too_large()
        yield piece


def copy_bounded(
    source: Readable, target: IO[bytes], *, max_bytes: int, too_large: Callable[[], Exception]
) -> int:
    """Copy the stream's bytes to a file; return their number.

    Raises ``too_large()``, with a part of them in the file, if there are more than the limit.
    """
    return sum(map(target.write, bounded_pieces(source, max_bytes=max_bytes, too_large=too_large)))
