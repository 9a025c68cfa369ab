"""The padded layout of a pass: sequences beside each other as rows of a rectangle.

It serves the base models that cannot compute a packed stream: those with recurrent states or
convolutions over the sequence, or with an attention of their own. The decoder gets (B, L) tokens
and computes its own attention, without a mask: every layer is causal, so padding after a sequence
changes none of its tokens. The rest of the engine still sees one stream of rows.

L depends on a sequence's own length only, and sequences of equal L share a rectangle: on a GPU all
of a pass, on a CPU those of one segment and, up to a length, all of a pass. The bits of a request
must not depend on its batch-mates there, but the order in which some families sum depends on B. So
the check at the start finds the length up to which it does not (``shared_rectangles``). Padding
rows get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.engine.torch.packing.ranges import RowRange, integers, stream_rows
from training.engine.torch.packing.stream import MIN_ROWS, Segment, round_up
from training.engine.torch.to_device import to_device

STEPS_PER_DOUBLING = 8
"""Padded lengths between a length and its double. At most an eighth of a rectangle is padding."""


def padded_length(length: int, *, longest: int) -> int:
    """The padded length of a sequence: a multiple of ``MIN_ROWS`` that grows with the length, but
    at most ``longest``, since later positions may not exist or be computed differently."""
    step = max(MIN_ROWS, (1 << (length - 1).bit_length()) // (2 * STEPS_PER_DOUBLING))
    return max(length, min(round_up(length, step), longest))


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Some of a stream's sequences as B rows of L tokens."""

    count: int
    length: int
    rows: Tensor
    """(n,) int64, the stream's rows of the sequences, one after another."""
    places: Tensor
    """(n,) int64, their places among the B * L."""
    segments: Sequence[Segment]
    """The adapters of the B * L places."""

    def spread(self, values: Tensor) -> Tensor:
        """(B, L) of a stream's integers (T,); zero at padding."""
        spread = values.new_zeros(self.count * self.length)
        return spread.index_copy(0, self.places, values[self.rows]).view(self.count, self.length)

    def positions(self, position_ids: Tensor, *, longest: int) -> Tensor:
        """(B, L) positions that continue after the end of each sequence, but end at ``longest``; of
        positions (A, T) on several axes (A, B, L), zero after the end."""
        if position_ids.ndim > 1:
            return torch.stack([self.spread(axis) for axis in position_ids])
        first = self.spread(position_ids)[:, :1]  # (B, 1)
        numbers = torch.arange(self.length, device=first.device)
        return (first + numbers).clamp_(max=longest - 1)

    def place_of(self, num_rows: int) -> Tensor:
        """(T,) int64, the place of each row of a stream of T rows; -1 for others."""
        place = torch.full((num_rows,), -1, device=self.places.device)
        return place.index_copy(0, self.rows, self.places)


@dataclass(frozen=True, kw_only=True)
class Longest:
    """Lengths that padding does not cross."""

    sequence: int
    """The longest sequence."""
    with_short_rotary: int | None
    """The longest sequence with the rotary factors for short ones; see ``rotary_switch``."""

    def of(self, *, is_long: bool) -> int:
        switch = self.with_short_rotary
        return self.sequence if switch is None or is_long else min(switch, self.sequence)


def make_grids(
    row_ranges: Sequence[RowRange],
    segments: Sequence[Segment],
    *,
    longest: Longest,
    is_long: Tensor | None,
    device: torch.device,
    is_shared: Callable[[int], bool],
) -> list[Grid]:
    """The rectangles of a stream, in order.

    Args:
        row_ranges: The sequences, in the order of the stream; none shares rows with another.
        segments: Of the stream. Sequences outside of them are padding and get no place.
        is_long: (T,) bool, rows of sequences with the rotary factors for long ones; None: none.
        is_shared: Whether several segments share a rectangle of this length.
    """
    owners = _owners(row_ranges, segments)
    number = {segment: i for i, segment in enumerate(segments)}
    members: dict[tuple[int, int, bool], list[RowRange]] = {}
    for row_range, owner in owners.items():
        long = is_long is not None and bool(is_long[row_range.start])
        length = padded_length(row_range.length, longest=longest.of(is_long=long))
        group = -1 if is_shared(length) else number[owner]
        members.setdefault((group, length, long), []).append(row_range)
    return [_make_grid(key[1], members[key], owners, device) for key in sorted(members)]


def _owners(
    row_ranges: Sequence[RowRange], segments: Sequence[Segment]
) -> Mapping[RowRange, Segment]:
    """The segment of each sequence that has one."""
    owners: dict[RowRange, Segment] = {}
    left = list(segments)
    for row_range in row_ranges:
        while left and left[0].end <= row_range.start:
            left.pop(0)
        if left and left[0].start <= row_range.start:
            owners[row_range] = left[0]
    return owners


def _make_grid(
    length: int,
    sequences: Sequence[RowRange],
    owners: Mapping[RowRange, Segment],
    device: torch.device,
) -> Grid:
    segments: list[Segment] = []
    last_owner = None
    for i, row_range in enumerate(sequences):
        owner = owners[row_range]
        start = segments.pop().start if owner is last_owner else i * length
        last_owner = owner
        segments.append(
            Segment(start=start, end=(i + 1) * length, weights=owner.weights, grad=owner.grad)
        )
    places = integers((i * length, row_range.length) for i, row_range in enumerate(sequences))
    return Grid(
        count=len(sequences),
        length=length,
        rows=to_device(stream_rows(sequences), device),
        places=to_device(places, device),
        segments=segments,
    )


def gather_rows(outputs: Sequence[Tensor], grids: Sequence[Grid], num_rows: int) -> Tensor:
    """(T, C) the stream's rows from the rectangles' outputs (B * L, C); rows without a place get
    those of some other row."""
    place = torch.zeros(num_rows, dtype=torch.int64, device=outputs[0].device)
    start = 0
    for grid in grids:
        place[grid.rows] = grid.places + start
        start += grid.count * grid.length
    return torch.cat(list(outputs)).index_select(0, place)
