"""Which datums begin alike, so that a pass computes their common beginning once.

The samples of one prompt, the turns of one conversation and the conversations under one system
message begin with the same tokens. Up to where they part, every layer computes the same rows for
all of them, forwards and, since gradients add up, backwards.

Beginnings are compared in blocks, so that what is shared ends at a multiple of ``SHARED_BLOCK``:
attention then meets few different lengths, and no range of a few tokens is worth a product of
its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby, takewhile

import numpy as np
from numpy.typing import NDArray

from training.engine.torch.packing.ranges import RowRange

SHARED_BLOCK = 16
"""Tokens."""

WORTHWHILE = 8
"""A sequence shares its beginning if that is at least one of so many parts of it: what comes before
a range makes its attention dearer (a fused kernel needs a mask where it knew causality)."""

Path = tuple[int, ...]
"""The blocks at a sequence's beginning that it shares, by number: equal numbers are equal blocks
after equal beginnings."""


def shared_paths(
    sequences: Sequence[NDArray[np.int32]], *, rotary_switch: int | None = None
) -> list[Path]:
    """Of each sequence, the blocks at its beginning that another has there too.

    Args:
        rotary_switch: Sequences that are longer begin otherwise, even with the same tokens.
    """
    numbers: dict[tuple[int, bytes], int] = {}
    paths: list[Path] = []
    for tokens in sequences:
        path = []
        is_long = rotary_switch is not None and len(tokens) > rotary_switch
        number = -2 if is_long else -1  # of the block before
        for start in range(0, len(tokens) - SHARED_BLOCK + 1, SHARED_BLOCK):
            block = tokens[start : start + SHARED_BLOCK].tobytes()
            number = numbers.setdefault((number, block), len(numbers))
            path.append(number)
        paths.append(tuple(path))
    return _shared(
        [
            path if len(path) * SHARED_BLOCK * WORTHWHILE >= len(tokens) else ()
            for path, tokens in zip(_shared(paths), sequences, strict=True)
        ]
    )


def _shared(paths: Sequence[Path]) -> list[Path]:
    """The paths as far as somebody else goes along."""
    users = Counter(number for path in paths for number in path)
    return [tuple(takewhile(lambda number: users[number] > 1, path)) for path in paths]


def lay_out(lengths: Sequence[int], paths: Sequence[Path], first_row: int) -> list[list[RowRange]]:
    """Give sequences their rows in a stream, those of a common beginning once.

    Args:
        lengths: Tokens of each.
        paths: Of each, what ``shared_paths`` said; the others named there may be missing here.
        first_row: Where the stream has room, as much as they need.

    Returns:
        Of each sequence, the ranges that it consists of. A range that is new has the rows
        that come next.
    """
    users = Counter(number for path in paths for number in path)
    made: dict[int, RowRange] = {}
    next_row = first_row
    laid_out = []
    for length, path in zip(lengths, _shared(paths), strict=True):
        row_ranges: list[RowRange] = []
        # Blocks with equally many users have the same ones: along a path they only leave.
        for _, run in groupby(path, lambda number: users[number]):
            *others, last = run
            if last not in made:
                size = (len(others) + 1) * SHARED_BLOCK
                made[last] = RowRange(start=next_row, length=size, before=tuple(row_ranges))
                next_row += size
            row_ranges.append(made[last])
        rest = length - len(path) * SHARED_BLOCK
        if rest:
            row_ranges.append(RowRange(start=next_row, length=rest, before=tuple(row_ranges)))
            next_row += rest
        laid_out.append(row_ranges)
    return laid_out
