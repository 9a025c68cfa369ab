"""Copies of a stream's sequences, padded to one length, so that they share batched products.

The arithmetic is float32 throughout. The query heads that share a key head are passed as
rows of one long query, so that no key is repeated for them. Padding comes after the real tokens,
where no real token sees it, and is zero, so not even a NaN of a neighbour reaches a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.engine.torch.packing.ranges import RowRange, integers, stream_rows
from training.engine.torch.to_device import to_device


@dataclass(frozen=True, kw_only=True, eq=False)
class Slots:
    """The places of some of the stream's rows in B sequences padded to one length L."""

    count: int
    length: int
    rows: Tensor
    """(n,) int64, rows of the stream; a row that several sequences see is repeated."""
    slots: Tensor
    """(n,) int64, their places among the B * L padded ones."""

    @classmethod
    def of(
        cls, sequences: Sequence[Sequence[RowRange]], length: int, device: torch.device
    ) -> Slots:
        """Each sequence's rows are those of its ranges, one after another."""
        sizes = [sum(each.length for each in ranges) for ranges in sequences]
        return cls(
            count=len(sequences),
            length=length,
            rows=to_device(stream_rows(each for ranges in sequences for each in ranges), device),
            slots=to_device(integers((i * length, size) for i, size in enumerate(sizes)), device),
        )

    def pack(self, x: Tensor, group: int) -> Tensor:
        """(T, H, D) -> (B * H / group, group, L, D) float32."""
        num_heads, head_size = x.shape[1:]
        padded = x.new_zeros((self.count * self.length, *x.shape[1:]), dtype=torch.float32)
        padded.index_copy_(0, self.slots, x.index_select(0, self.rows).float())
        split = padded.view(self.count, self.length, num_heads // group, group, head_size)
        by_head = split.permute(0, 2, 3, 1, 4)
        return by_head.reshape(-1, group, self.length, head_size)

    def unpack(self, packed: Tensor, into: Tensor) -> None:
        """The inverse: write the rows of ``into`` (T, H, D), each at most once."""
        into.index_copy_(0, self.rows, self._unpadded(packed, into).to(into.dtype))

    def add(self, packed: Tensor, to: Tensor) -> None:
        """Likewise, but add to the rows of ``to`` (T, H, D) float32, once for each occurrence."""
        to.index_add_(0, self.rows, self._unpadded(packed, to))

    def _unpadded(self, packed: Tensor, like: Tensor) -> Tensor:
        """(n, H, D)"""
        split = packed.view(self.count, -1, *packed.shape[1:])
        padded = split.permute(0, 3, 1, 2, 4).reshape(-1, *like.shape[1:])  # (B * L, H, D)
        return padded.index_select(0, self.slots)
