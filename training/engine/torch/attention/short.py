"""Causal attention of many short sequences in few products, on a CPU.

Ranges are padded to a multiple of ``BUCKET_TOKENS``, and all ranges of the same padded length after
equally many tokens share batched matrix products, wherever they are in the stream. A
range's bucket depends on its own sequence alone, and its products are the same whether the
batch has one range or many, so batch-mates do not change its bits (measured with MKL,
one thread and two).

The arithmetic is float32 throughout. The query heads that share a key head are passed as
rows of one long query, so that no key is repeated for them. Padding comes after the real tokens,
where no real token sees it, and is zero, so not even a NaN of a neighbour reaches a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from training.engine.torch.packing.ranges import RowRange, integers, stream_rows
from training.engine.torch.packing.stream import round_up

SHORT_TOKENS = 192
"""Up to this length these products are faster than torch's fused kernel (measured with heads
of 64, forward and backward): a fifth less in float32, less than half in bfloat16."""

BUCKET_TOKENS = 16
"""Sequences of one bucket begin at multiples of this many rows: at equal places in a vector
register and in a cache line, which affect some kernels' order of summing."""

NARROW = 16
"""Matrix products with fewer columns than this take up to four times longer than transposed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Slots:
    """The places of some of the stream's rows in B sequences padded to one length L."""

    count: int
    length: int
    rows: Tensor
    """(n,) int64, rows of the stream; a row that several sequences see is repeated."""
    slots: Tensor
    """(n,) int64, their places among the B * L padded ones."""

    def pack(self, x: Tensor, group: int) -> Tensor:
        """(T, H, D) -> (B * H / group, group * L, D) float32, a group's heads one after another."""
        num_heads, head_size = x.shape[1:]
        padded = x.new_zeros((self.count * self.length, *x.shape[1:]), dtype=torch.float32)
        padded.index_copy_(0, self.slots, x.index_select(0, self.rows).float())
        split = padded.view(self.count, self.length, num_heads // group, group, head_size)
        return split.permute(0, 2, 3, 1, 4).reshape(-1, group * self.length, head_size)

    def unpack(self, packed: Tensor, group: int, into: Tensor) -> None:
        """The inverse: write the rows of ``into`` (T, H, D), each at most once."""
        into.index_copy_(0, self.rows, self._unpadded(packed, group, into).to(into.dtype))

    def add(self, packed: Tensor, group: int, to: Tensor) -> None:
        """Likewise, but add to the rows of ``to`` (T, H, D) float32, once for each occurrence."""
        to.index_add_(0, self.rows, self._unpadded(packed, group, to))

    def _unpadded(self, packed: Tensor, group: int, like: Tensor) -> Tensor:
        """(n, H, D)"""
        split = packed.view(self.count, -1, group, self.length, packed.shape[2])
        padded = split.permute(0, 3, 1, 2, 4).reshape(-1, *like.shape[1:])  # (B * L, H, D)
        return padded.index_select(0, self.slots)


@dataclass(frozen=True, kw_only=True, eq=False)
class Bucket:
    """Ranges of one padded length after equally many tokens."""

    num_before: int
    queries: Slots
    keys: Slots
    """The tokens before a range, padded like a range, and then the range; the same as ``queries``
    if there are no tokens before."""


def make_buckets(row_ranges: Sequence[RowRange]) -> list[Bucket]:
    """The short ranges of a stream."""
    members: dict[tuple[int, int], list[RowRange]] = {}
    for row_range in row_ranges:
        key = (row_range.num_before, padded_length(row_range.length))
        members.setdefault(key, []).append(row_range)
    return [_bucket(*key, alike) for key, alike in members.items()]


def _bucket(num_before: int, length: int, row_ranges: Sequence[RowRange]) -> Bucket:
    queries = Slots(
        count=len(row_ranges),
        length=length,
        rows=stream_rows(row_ranges),
        slots=integers([(i * length, s.length) for i, s in enumerate(row_ranges)]),
    )
    if not num_before:
        return Bucket(num_before=0, queries=queries, keys=queries)
    first_own = padded_length(num_before)
    size = first_own + length
    keys = Slots(
        count=len(row_ranges),
        length=size,
        rows=stream_rows(each for row_range in row_ranges for each in row_range.seen),
        slots=integers(
            [
                bounds
                for i, s in enumerate(row_ranges)
                for bounds in ((i * size, num_before), (i * size + first_own, s.length))
            ]
        ),
    )
    return Bucket(num_before=num_before, queries=queries, keys=keys)


def padded_length(length: int) -> int:
    return round_up(length, BUCKET_TOKENS)


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, buckets: Sequence[Bucket], scaling: float
) -> Tensor:
    """Attention of the rows of all buckets; zero for other rows.

    Args:
        query: (T, Hq, D).
        key: (T, Hkv, D), and ``value`` likewise.

    Returns:
        (T, Hq, D), in the queries' dtype.
    """
    output: Tensor = _ShortAttention.apply(query, key, value, buckets, scaling)  # type: ignore[no-untyped-call]  # torch has no types
    return output


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        buckets: Sequence[Bucket],
        scaling: float,
    ) -> Tensor:
        group = query.shape[1] // key.shape[1]
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        saved = []
        for bucket in buckets:
            q = bucket.queries.pack(query, group)
            k, v = bucket.keys.pack(key, 1), bucket.keys.pack(value, 1)
            mask = _causal_mask(bucket.queries.length, bucket.num_before, group)
            # (B * Hkv, group * L, keys)
            shares = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scaling).softmax(-1)
            bucket.queries.unpack(product(shares, v), group, output)
            saved += [q, k, v, shares]
        ctx.save_for_backward(*saved)
        ctx.buckets, ctx.scaling, ctx.num_key_heads = buckets, scaling, key.shape[1]
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        grad_query = torch.zeros_like(grad_output, memory_format=torch.contiguous_format)
        num_tokens, num_heads, head_size = grad_output.shape
        shape = (num_tokens, ctx.num_key_heads, head_size)
        # A row that many sequences see has a gradient from each, so the sum is kept in float32.
        grad_key = grad_output.new_zeros(shape, dtype=torch.float32)
        grad_value = torch.zeros_like(grad_key)
        group = num_heads // ctx.num_key_heads
        saved = ctx.saved_tensors  # may be read only once, where they were computed again
        for i, bucket in enumerate(ctx.buckets):
            q, k, v, shares = saved[4 * i : 4 * i + 4]
            g = bucket.queries.pack(grad_output, group)
            grad_shares = torch.bmm(g, v.transpose(1, 2))
            # The backward of torch's own softmax: shares * (grad - sum of the products).
            grad_scores = torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
            grad_scores.mul_(ctx.scaling)
            bucket.queries.unpack(product(grad_scores, k), group, grad_query)
            bucket.keys.add(product(grad_scores.transpose(1, 2), q), 1, grad_key)
            bucket.keys.add(product(shares.transpose(1, 2), g), 1, grad_value)
        dtype = grad_output.dtype
        return grad_query, grad_key.to(dtype), grad_value.to(dtype), None, None


def product(left: Tensor, right: Tensor) -> Tensor:
    """Batched left @ right."""
    if right.shape[2] >= NARROW:
        return torch.bmm(left, right)
    return torch.bmm(right.transpose(1, 2), left.transpose(1, 2)).transpose(1, 2)


@lru_cache(maxsize=64)
def _causal_mask(length: int, num_before: int, group: int) -> Tensor:
    """(1, group * L, keys): 0 where a row's token sees a column's, else minus infinity."""
    own = torch.full((length, length), -math.inf).triu(1)
    before = torch.zeros(length, padded_length(num_before))
    before[:, num_before:] = -math.inf
    return torch.cat([before, own], dim=1).repeat(group, 1)[None]
