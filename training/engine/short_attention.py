"""Causal attention of many short sequences in few products, on a CPU.

Sequences are padded to a multiple of ``BUCKET_TOKENS``, and all that come to the same length share
batched matrix products, whatever lies between them in the stream. A sequence's bucket follows
from its own length alone, and its products are the same whether the batch holds one sequence or
many, so its bits do not tell what shared the pass (measured with MKL, one thread and two).

The arithmetic is float32 throughout. The query heads that share a key head are handed over as
rows of one long query, so that no key is repeated. Padding comes after the real tokens, where no
real token sees it, and is zero: not even a NaN of a neighbour could reach a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from training.engine.packed import round_up

SHORT_TOKENS = 192
"""Up to this length these products take less time than torch's fused kernel (measured with heads
of 64, forward and backward): a fifth less in float32, less than half in bfloat16."""

BUCKET_TOKENS = 16
"""Sequences of one bucket begin at multiples of so many rows: at equal places in a vector
register and in a cache line, on which some kernels' order of summing depends."""

NARROW = 16
"""Matrix products with fewer columns than this take up to four times longer than transposed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bucket:
    """B sequences that are padded to the same length L; n real tokens in all."""

    count: int
    length: int
    rows: Tensor
    """(n,) int64, where the stream has the tokens."""
    slots: Tensor
    """(n,) int64, their places among the B * L padded ones."""

    def packed(self, x: Tensor, group: int) -> Tensor:
        """(T, H, D) -> (B * H / group, group * L, D) float32, a group's heads one after another."""
        num_heads, head_size = x.shape[1:]
        padded = x.new_zeros((self.count * self.length, *x.shape[1:]), dtype=torch.float32)
        padded.index_copy_(0, self.slots, x.index_select(0, self.rows).float())
        split = padded.view(self.count, self.length, num_heads // group, group, head_size)
        return split.permute(0, 2, 3, 1, 4).reshape(-1, group * self.length, head_size)

    def unpack(self, packed: Tensor, group: int, into: Tensor) -> None:
        """The reverse; writes this bucket's rows of ``into`` (T, H, D)."""
        split = packed.view(self.count, -1, group, self.length, packed.shape[2])
        padded = split.permute(0, 3, 1, 2, 4).reshape(-1, *into.shape[1:])  # (B * L, H, D)
        into.index_copy_(0, self.rows, padded.index_select(0, self.slots).to(into.dtype))


def make_buckets(lengths: Sequence[int]) -> list[Bucket]:
    """``lengths``: tokens of each sequence in stream order, which add up to T."""
    starts = accumulate(lengths, initial=0)
    members: dict[int, list[tuple[int, int]]] = {}
    for start, length in zip(starts, lengths, strict=False):  # the last start is T
        padded = round_up(length, BUCKET_TOKENS)
        members.setdefault(padded, []).append((start, length))
    return [
        Bucket(
            count=len(sequences),
            length=padded,
            rows=_stretches(sequences),
            slots=_stretches([(i * padded, length) for i, (_, length) in enumerate(sequences)]),
        )
        for padded, sequences in members.items()
    ]


def _stretches(bounds: Sequence[tuple[int, int]]) -> Tensor:
    """The integers of each stretch (start, length), (n,) int64."""
    return torch.cat([torch.arange(start, start + length) for start, length in bounds])


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, buckets: Sequence[Bucket], scaling: float
) -> Tensor:
    """Attention of the T tokens that the buckets share out among them.

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
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        saved = []
        for bucket in buckets:
            q, k, v = bucket.packed(query, group), bucket.packed(key, 1), bucket.packed(value, 1)
            mask = _causal_mask(bucket.length, group)
            # (B * Hkv, group * L, L)
            shares = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scaling).softmax(-1)
            bucket.unpack(_product(shares, v), group, output)
            saved += [q, k, v, shares]
        ctx.save_for_backward(*saved)
        ctx.buckets, ctx.scaling, ctx.num_key_heads = buckets, scaling, key.shape[1]
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        grad_query = torch.empty_like(grad_output, memory_format=torch.contiguous_format)
        num_tokens, num_heads, head_size = grad_output.shape
        grad_key = grad_output.new_empty((num_tokens, ctx.num_key_heads, head_size))
        grad_value = torch.empty_like(grad_key)
        group = num_heads // ctx.num_key_heads
        for i, bucket in enumerate(ctx.buckets):
            q, k, v, shares = ctx.saved_tensors[4 * i : 4 * i + 4]
            g = bucket.packed(grad_output, group)
            grad_shares = torch.bmm(g, v.transpose(1, 2))
            # What torch's own softmax does in its backward: shares * (grad - sum of the products).
            grad_scores = torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
            grad_scores.mul_(ctx.scaling)
            bucket.unpack(_product(grad_scores, k), group, grad_query)
            bucket.unpack(_product(grad_scores.transpose(1, 2), q), 1, grad_key)
            bucket.unpack(_product(shares.transpose(1, 2), g), 1, grad_value)
        return grad_query, grad_key, grad_value, None, None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Batched left @ right."""
    if right.shape[2] >= NARROW:
        return torch.bmm(left, right)
    return torch.bmm(right.transpose(1, 2), left.transpose(1, 2)).transpose(1, 2)


@lru_cache(maxsize=64)
def _causal_mask(length: int, group: int) -> Tensor:
    """(1, group * L, L): 0 where a row's token sees a column's, else minus infinity."""
    return torch.full((length, length), -math.inf).triu(1).repeat(group, 1)[None]
