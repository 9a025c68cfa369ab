"""Puts the rows of a pass in the order of their experts.

A token goes to several experts; each (token, expert) is a pair. Pairs are sorted by expert, and
within an expert by the adapter's segment: then the rows of an expert are consecutive, for the base
model's product, and so are those of one segment among them, for the adapter's.

On a CPU each of these smallest groups is filled up with copies of its own rows to a multiple of a
few rows. Kernels take rows in such blocks and sum the remaining rows in another order, so without
that a row's last bits would depend on how many others chose its expert (measured in float32 and
bfloat16, with one thread and two). The copies are never read, and their gradients are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from training.engine.torch.adapters import AdapterTensors
from training.engine.torch.packing.stream import Segment, fewest_rows, round_up
from training.engine.torch.to_device import to_device

ROWS_MULTIPLE = 4
"""Rows of a block of the CPU's kernels; those for bfloat16 take two."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentPairs:
    """The pairs of one segment, n with the filling, in the order of their experts."""

    segment: Segment
    weights: AdapterTensors
    rows: Tensor | None
    """(n,) their rows among all P; None: they are all of them."""
    token: Tensor
    """(n,) the token of each, counted from the segment's first."""
    position: Tensor
    """(t, k) where the pairs of each of the segment's tokens are among the n."""
    ends: Tensor
    """(E,) int32, by expert."""

    def of(self, values: Tensor) -> Tensor:
        """The segment's rows (n, ...) of ``values`` (P, ...), contiguous in either case: a kernel
        for few columns sums others in another order."""
        return values.contiguous() if self.rows is None else values.index_select(0, self.rows)

    def add_to(self, target: Tensor, values: Tensor, scale: float = 1.0) -> None:
        """target (P, N) += scale * values (n, N), in the segment's rows."""
        values = values * scale  # first: the two additions would round it differently
        if self.rows is None:
            target.add_(values)
        else:
            target.index_add_(0, self.rows, values)


@dataclass(frozen=True, kw_only=True, eq=False)
class Grouping:
    """The pairs of T tokens with k experts each, P with the filling, in order."""

    token: Tensor
    """(P,) int64"""
    position: Tensor
    """(T, k) int64: the row of each pair."""
    ends: Tensor
    """(E,) int32: the row after each expert's last."""
    segments: Sequence[SegmentPairs]
    """Of the segments that have an adapter here."""

    @cached_property
    def expert(self) -> Tensor:
        """(P,) int64"""
        rows = torch.arange(len(self.token), device=self.token.device)
        return torch.searchsorted(self.ends.long(), rows, right=True)

    def weights(self, weights: Tensor) -> Tensor:
        """(P,) of (T, k), zero for the filling."""
        by_row = weights.new_zeros(len(self.token))
        by_row[self.position.flatten()] = weights.flatten()
        return by_row


def sum_by_token(values: Tensor, position: Tensor, weights: Tensor | None = None) -> Tensor:
    """(t, N) float32 sums over the pairs of each token, in the order of ``position`` (t, k).

    Args:
        values: (n, N).
        weights: (t, k), a factor of each pair; None: 1.
    """
    total = torch.zeros(len(position), values.shape[1], device=values.device)
    for j in range(position.shape[1]):
        own = values.index_select(0, position[:, j]).float()
        total += own if weights is None else own * weights[:, j : j + 1].float()
    return total


def rows_multiple(device: torch.device, dtype: torch.dtype, smallest_matrix: int) -> int:
    """The number of rows of which a group has a multiple.

    Args:
        smallest_matrix: Elements of the smallest matrix that its rows are multiplied by.
    """
    if device.type != "cpu":
        return 1
    return max(ROWS_MULTIPLE, round_up(fewest_rows(device, dtype, smallest_matrix), ROWS_MULTIPLE))


def group(
    chosen: Tensor, segments: Sequence[Segment], multiples: Sequence[int], *, num_experts: int
) -> Grouping:
    """Group the rows of a pass.

    Args:
        chosen: (T, k) int64, the experts of each token.
        segments: Those that have an adapter on one of the stack's layers.
        multiples: Of how many rows the groups of tokens without an adapter have a multiple, then
            those of each segment. A segment's is its own, so that batch-mates do not change it.
    """
    num_parts = len(multiples)
    is_filled = any(multiple > 1 for multiple in multiples)
    part = chosen.new_zeros(len(chosen))  # (T,), 0 is without an adapter
    for number, segment in enumerate(segments, 1):
        part[segment.rows] = number
    key = (chosen * num_parts + part[:, None]).flatten()  # (T * k,)
    order = key.argsort(stable=True)
    counts = chosen.new_zeros(num_experts * num_parts).scatter_add_(0, key, torch.ones_like(key))
    multiple = to_device(multiples, key.device).repeat(num_experts)
    filled = (counts + multiple - 1) // multiple * multiple  # (E * parts,)
    filling_before = (filled.cumsum(0) - filled) - (counts.cumsum(0) - counts)
    row = torch.arange(len(key), device=key.device) + filling_before[key[order]]
    position = torch.empty_like(key)
    position[order] = row
    position = position.view_as(chosen)
    token = order // chosen.shape[1]
    if is_filled:
        token = _filled_tokens(token, row, counts, filled)
    by_part = filled.view(num_experts, num_parts)
    has_all = len(segments) == 1 and segments[0].end - segments[0].start == len(chosen)
    return Grouping(
        token=token,
        position=position,
        ends=by_part.sum(1).cumsum(0).int(),
        segments=[
            _segment_pairs(
                segment,
                token,
                position,
                by_part[:, number],
                has_all=has_all,
                is_filled=is_filled,
            )
            for number, segment in enumerate(segments, 1)
        ],
    )


def _filled_tokens(token: Tensor, row: Tensor, counts: Tensor, filled: Tensor) -> Tensor:
    """(P,) the token of each row; the filling of a group repeats its first."""
    if len(token) == 0:
        return token
    first = (counts.cumsum(0) - counts).clamp(max=len(token) - 1)
    tokens = token[first].repeat_interleave(filled)
    tokens[row] = token
    return tokens


def _segment_pairs(
    segment: Segment,
    token: Tensor,
    position: Tensor,
    filled: Tensor,
    *,
    has_all: bool,
    is_filled: bool,
) -> SegmentPairs:
    """The pairs of one segment of a grouping.

    Args:
        token: (P,) of the grouping.
        position: (T, k) of the grouping.
        filled: (E,) rows of the segment by expert, with the filling.
        has_all: Whether it is the only segment, over all tokens.
        is_filled: Whether groups may have more rows than pairs.
    """
    assert segment.weights is not None  # noqa: S101 - it has an adapter
    rows, position = None, position[segment.rows]  # (t, k)
    if not has_all:
        is_own = (token >= segment.start) & (token < segment.end)  # (P,)
        if is_filled:
            rows = is_own.nonzero()[:, 0]  # (n,)
        else:  # their number is known, and a host must not wait for a GPU to count them
            rows = is_own.logical_not().argsort(stable=True)[: position.numel()]
        place = torch.empty_like(token)
        place[rows] = torch.arange(len(rows), device=rows.device)
        token, position = token[rows], place[position]
    return SegmentPairs(
        segment=segment,
        weights=segment.weights,
        rows=rows,
        token=token - segment.start,
        position=position,
        ends=filled.cumsum(0).int(),
    )
