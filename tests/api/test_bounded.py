"""A stream is copied up to its limit, and no further."""

from __future__ import annotations

import io

import pytest

from tinkerapi.api.bodies.bounded import PIECE_BYTES, copy_bounded


class TooLarge(Exception):
    pass


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
def test_a_stream_of_exactly_the_limit_is_copied(size: int) -> None:
    content, target = bytes(range(256)) * (size // 256 + 1), io.BytesIO()
    source = io.BytesIO(content[:size])
    assert copy_bounded(source, target, max_bytes=size, too_large=TooLarge) == size
    assert target.getvalue() == content[:size]


@pytest.mark.parametrize("limit", [0, 1, PIECE_BYTES, 2 * PIECE_BYTES])
def test_one_byte_more_is_refused_and_not_written(limit: int) -> None:
    source, target = io.BytesIO(bytes(limit + 1)), io.BytesIO()
    with pytest.raises(TooLarge):
        copy_bounded(source, target, max_bytes=limit, too_large=TooLarge)
    assert len(target.getvalue()) <= limit
