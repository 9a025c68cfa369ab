"""Sequences of a stream as rows of rectangles, and back."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from training.engine.torch.packing.ranges import whole_sequences
from training.engine.torch.packing.stream import MIN_ROWS, Segment
from training.engine.torch.padded.grid import (
    Longest,
    gather_rows,
    make_grids,
    padded_length,
)

CPU = torch.device("cpu")


@given(length=st.integers(1, 100_000), room=st.integers(0, 100_000))
def test_padding_is_an_eighth_at_most_and_never_passes_the_end(length: int, room: int) -> None:
    longest = length + room
    padded = padded_length(length, longest=longest)
    assert length <= padded <= longest
    assert padded == longest or padded % MIN_ROWS == 0
    assert padded - length < max(MIN_ROWS, length / 8)


@given(lengths=st.lists(st.lists(st.integers(1, 70), min_size=1), min_size=1, max_size=4))
def test_every_row_goes_to_its_sequence_and_comes_back(lengths: list[list[int]]) -> None:
    row_ranges = whole_sequences(n for own in lengths for n in own)
    segments, start = [], 0
    for own in lengths:
        segments.append(Segment(start=start, end=start + sum(own), weights=None))
        start += sum(own)
    longest = Longest(sequence=70, with_short_rotary=None)
    grids = make_grids(
        row_ranges, segments, longest=longest, is_long=None, device=CPU, is_shared=lambda n: n < 40
    )

    rows = torch.arange(start) + 1
    spread = [grid.spread(rows) for grid in grids]

    outputs = [values.flatten()[:, None] for values in spread]
    assert torch.equal(gather_rows(outputs, grids, start)[:, 0], rows)
    for values in (row[row > 0] for grid in spread for row in grid):
        assert torch.equal(values, torch.arange(len(values)) + values[0])  # one sequence
    assert sum(grid.count for grid in grids) == len(row_ranges)


def test_sequences_of_different_rotary_factors_are_not_padded_into_each_other() -> None:
    row_ranges = whole_sequences([30, 33])
    segments = [Segment(start=0, end=63, weights=None)]
    grids = make_grids(
        row_ranges,
        segments,
        longest=Longest(sequence=64, with_short_rotary=32),
        is_long=torch.arange(63) >= 30,
        device=CPU,
        is_shared=lambda length: False,
    )
    assert [(grid.count, grid.length) for grid in grids] == [(1, 32), (1, 48)]
    (short, long) = (
        grid.positions(torch.cat([torch.arange(30), torch.arange(33)]), longest=64)
        for grid in grids
    )
    assert short.max() == 31
    assert long.max() == 47
