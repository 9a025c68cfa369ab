"""Where a packed stream has its sequences: whole ones, or stretches that several share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Stretch:
    """Neighbouring rows of a stream that see themselves causally, and all of what came before.

    A sequence that shares nothing is one stretch. Sequences that begin alike are one stretch for
    the common beginning and one each for the rest, and so on, as a tree branches.
    """

    start: int
    """Its first row."""
    length: int
    before: tuple[Stretch, ...] = ()
    """What came before, the beginning of the sequence first."""

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def num_before(self) -> int:
        """Tokens that came before; the position of its own first token."""
        return sum(stretch.length for stretch in self.before)

    @property
    def num_keys(self) -> int:
        """Tokens that its last one sees, itself included."""
        return self.num_before + self.length

    @property
    def seen(self) -> tuple[Stretch, ...]:
        """What came before, and then itself."""
        return (*self.before, self)


def whole_sequences(lengths: Iterable[int]) -> list[Stretch]:
    """Sequences of so many tokens, one after another in the stream, that share nothing."""
    stretches: list[Stretch] = []
    start = 0
    for length in lengths:
        stretches.append(Stretch(start=start, length=length))
        start += length
    return stretches


def stream_rows(stretches: Iterable[Stretch]) -> Tensor:
    """(n,) int64, the rows of the stretches, one after another."""
    return integers((stretch.start, stretch.length) for stretch in stretches)


def integers(bounds: Iterable[tuple[int, int]]) -> Tensor:
    """(n,) int64, so many integers (start, length) from each start, one after another."""
    return torch.cat([torch.arange(start, start + length) for start, length in bounds])


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """(n, ...) the rows (n,) of x (T, ...), each as often as it is named.

    Its gradient is summed in float32 whatever the tensor's own type: of a row that many read, one
    part after another would vanish in a bfloat16 sum.
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
