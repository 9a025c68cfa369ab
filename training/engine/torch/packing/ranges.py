"""The sequences of a packed stream: whole ones, or ranges that several share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class RowRange:
    """Adjacent rows of a stream that see each other causally, and all earlier rows of the sequence.

    A sequence that shares nothing is one range. Sequences with a shared prefix are one range for
    the prefix and one each for the rest, and so on, as in a tree.
    """

    start: int
    """Its first row."""
    length: int
    before: tuple[RowRange, ...] = ()
    """The earlier ranges of the sequence, in order."""

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def num_before(self) -> int:
        """Earlier tokens; the position of its own first token."""
        return sum(row_range.length for row_range in self.before)

    @property
    def num_keys(self) -> int:
        """Tokens that its last token sees, itself included."""
        return self.num_before + self.length

    @property
    def seen(self) -> tuple[RowRange, ...]:
        """The earlier ranges, and then itself."""
        return (*self.before, self)


def whole_sequences(lengths: Iterable[int]) -> list[RowRange]:
    """Sequences of these lengths, one after another in the stream, that share nothing."""
    row_ranges: list[RowRange] = []
    start = 0
    for length in lengths:
        row_ranges.append(RowRange(start=start, length=length))
        start += length
    return row_ranges


def stream_rows(row_ranges: Iterable[RowRange]) -> Tensor:
    """(n,) int64, the rows of the ranges, one after another."""
    return integers((row_range.start, row_range.length) for row_range in row_ranges)


def integers(bounds: Iterable[tuple[int, int]]) -> Tensor:
    """(n,) int64, for each (start, length) the integers from start on, concatenated."""
    return torch.cat([torch.arange(start, start + length) for start, length in bounds])


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """(n, ...) the rows (n,) of x (T, ...), with repetitions.

    The gradient is summed in float32 for every dtype: for a row that many read, small
    parts would vanish in a bfloat16 sum.
    """
    taken: Tensor = _TakeRows.apply(x, rows)  # type: ignore[no-untyped-call]  # torch has no types
    return taken


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.rows, ctx.num_rows = rows, len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.new_zeros((ctx.num_rows, *grad.shape[1:]), dtype=torch.float32)
        total.index_add_(0, ctx.rows, grad.float())
        return total.to(grad.dtype), None
