"""Finds datums with shared prefixes, which a pass computes once.

The samples of one prompt, the turns of one conversation and the conversations under one system
message begin with the same tokens. Up to their first difference, every layer computes the same rows
for all of them, forwards and, since gradients add up, backwards.

Prefixes are compared in blocks, so a shared prefix ends at a multiple of ``SHARED_BLOCK``:
attention then has few different lengths, and no separate product for a range of a few
tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby, takewhile
from typing import Any

from numpy.typing import NDArray

from training.engine.torch.packing.ranges import RowRange

SHARED_BLOCK = 16
"""Tokens."""

WORTHWHILE = 8
"""A sequence shares a prefix of at least this fraction of it (one eighth): tokens before
a range make its attention more expensive (a fused kernel needs an explicit mask)."""

Path = tuple[int, ...]
"""The shared blocks at a sequence's beginning, by number: equal numbers mean equal blocks
after equal prefixes."""


def shared_paths(
    sequences: Sequence[NDArray[Any]], *, rotary_switch: int | None = None
) -> list[Path]:
    """For each sequence, the blocks at its beginning that another one shares.

    Args:
        rotary_switch: Longer sequences share nothing with shorter ones, even with the same tokens.
    """
    numbers: dict[tuple[int, bytes], int] = {}
    paths: list[Path] = []
    for tokens in sequences:
        path = []
        is_long = rotary_switch is not None and len(tokens) > rotary_switch
        number = -2 if is_long else -1  # number of the previous block
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
    """The paths, cut where no other sequence shares them."""
    users = Counter(number for path in paths for number in path)
    return [tuple(takewhile(lambda number: users[number] > 1, path)) for path in paths]


def lay_out(lengths: Sequence[int], paths: Sequence[Path], first_row: int) -> list[list[RowRange]]:
    """Assign rows of a stream to sequences, those of a shared prefix once.

    Args:
        lengths: The length of each sequence.
        paths: Each sequence's path of ``shared_paths``; sequences that share it may be missing
            here.
        first_row: The first free row of the stream.

    Returns:
        The ranges of each sequence. A new range gets the rows
        that come next.
    """
    users = Counter(number for path in paths for number in path)
    made: dict[int, RowRange] = {}
    next_row = first_row
    laid_out = []
    for length, path in zip(lengths, _shared(paths), strict=True):
        row_ranges: list[RowRange] = []
        # Blocks with equally many users have the same users: along a path, users only drop out.
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
