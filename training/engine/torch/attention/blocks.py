"""Attention with a window, a chunk, a cap on its scores or sinks, by blocks of queries.

No fused kernel of torch supports caps and sinks, and none on a CPU supports windows. So these
layers are computed by their formula, in float32. A sequence's queries are cut into blocks of
``BLOCK_TOKENS``; a block uses only the keys that one of its tokens sees, so a layer with a
window costs the same for each token of a sequence of any length. Blocks of one shape share batched
products across sequences, and their shapes depend on their own sequence alone:
batch-mates do not change a sequence's bits (measured with MKL, one thread and two).

Only the inputs are kept for the backward pass, which computes the scores again. They would be
most of a long sequence's memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.engine.torch.attention.short import Slots, padded_length, product
from training.engine.torch.attention.variants import Reach, Variant
from training.engine.torch.packing.ranges import RowRange, integers, stream_rows

BLOCK_TOKENS = 128

GROUP_SCORES = 2**20
"""Scores of one query head in memory at one time, unless one block has more."""


def most_scores(num_tokens: int, reach: Reach) -> int:
    """The most scores of one query head in memory at one time, for a sequence of this length."""
    limit, num_queries = reach.limit, min(num_tokens, BLOCK_TOKENS)
    if limit is None:  # every block sees another number of keys, so it is computed alone
        return num_queries * num_tokens
    num_keys = min(num_tokens, limit + BLOCK_TOKENS)
    return max(num_queries * num_keys, min(GROUP_SCORES, num_tokens * num_keys))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Block:
    """Adjacent queries of one range and the keys that they see."""

    query_rows: Tensor
    """(q,) int64, rows of the stream."""
    key_rows: Tensor
    """(k,) int64, those before the queries first; the last q are the queries' own."""
    first_query: int
    """Its position in the sequence."""

    @property
    def num_before(self) -> int:
        return len(self.key_rows) - len(self.query_rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockGroup:
    """Blocks of one shape, which share batched products."""

    queries: Slots
    keys: Slots
    mask: Tensor
    """(L, keys) float32: 0 where a query sees a key, else minus infinity."""


def make_block_groups(
    row_ranges: Sequence[RowRange], reach: Reach, device: torch.device
) -> list[BlockGroup]:
    """The ranges, cut into blocks, those of one shape together."""
    members: dict[tuple[int, ...], list[_Block]] = {}
    for row_range in row_ranges:
        for block in _cut(row_range, reach):
            # A chunk's end depends on the position; windows and causality are relative.
            place = block.first_query % reach.chunk if reach.chunk else 0
            shape = (block.num_before, padded_length(len(block.query_rows)), place)
            members.setdefault(shape, []).append(block)
    groups = []
    for (num_before, length, _), alike in members.items():
        at_once = max(1, GROUP_SCORES // (length * (num_before + length)))
        for start in range(0, len(alike), at_once):
            some = alike[start : start + at_once]
            groups.append(_group(some, num_before, length, reach, device))
    return groups


def _cut(row_range: RowRange, reach: Reach) -> Iterator[_Block]:
    rows = stream_rows(row_range.seen)  # of the whole sequence, as far as this range goes
    for first in range(row_range.num_before, row_range.num_keys, BLOCK_TOKENS):
        end = min(first + BLOCK_TOKENS, row_range.num_keys)
        first_key = reach.first_key(first)
        yield _Block(query_rows=rows[first:end], key_rows=rows[first_key:end], first_query=first)


def _group(
    blocks: Sequence[_Block], num_before: int, length: int, reach: Reach, device: torch.device
) -> BlockGroup:
    size = num_before + length

    def slots(rows: list[Tensor], padded: int) -> Slots:
        return Slots(
            count=len(blocks),
            length=padded,
            rows=torch.cat(rows).to(device),
            slots=integers((i * padded, len(own)) for i, own in enumerate(rows)).to(device),
        )

    first = blocks[0].first_query
    queries = torch.arange(first, first + length, device=device)
    keys = torch.arange(first - num_before, first + length, device=device)
    mask = torch.zeros(length, size, device=device)
    return BlockGroup(
        queries=slots([block.query_rows for block in blocks], length),
        keys=slots([block.key_rows for block in blocks], size),
        mask=mask.masked_fill_(~reach.sees(queries, keys), -math.inf),
    )


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Sequence[BlockGroup],
    variant: Variant,
    scaling: float,
) -> Tensor:
    """Attention of the rows of all groups; zero for other rows.

    Args:
        query: (T, Hq, D).
        key: (T, Hkv, D), and ``value`` likewise.

    Returns:
        (T, Hq, D), in the queries' dtype.
    """
    output: Tensor = _BlockAttention.apply(query, key, value, groups, variant, scaling)  # type: ignore[no-untyped-call]  # torch has no types
    return output


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        groups: Sequence[BlockGroup],
        variant: Variant,
        scaling: float,
    ) -> Tensor:
        heads_each = query.shape[1] // key.shape[1]
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        for group in groups:
            q = group.queries.pack(query, heads_each)
            k, v = group.keys.pack(key, 1), group.keys.pack(value, 1)
            shares = _shares(q, k, group, variant, scaling)
            group.queries.unpack(product(shares, v), heads_each, output)
        ctx.save_for_backward(query, key, value)
        ctx.groups, ctx.variant, ctx.scaling = groups, variant, scaling
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value = ctx.saved_tensors
        heads_each = query.shape[1] // key.shape[1]
        grad_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
        # A key that many blocks see has a gradient from each, so the sum is kept in float32.
        grad_key = torch.zeros_like(key, dtype=torch.float32)
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        for group in ctx.groups:
            q = group.queries.pack(query, heads_each)
            g = group.queries.pack(grad_output, heads_each)
            k, v = group.keys.pack(key, 1), group.keys.pack(value, 1)
            shares = _shares(q, k, group, ctx.variant, ctx.scaling)
            grad_shares = torch.bmm(g, v.transpose(1, 2))
            # The derivative of a softmax; a sink is part of its sum, but contributes no value.
            grad_scores = torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
            if ctx.variant.softcap is not None:
                grad_scores.mul_(_slope(q, k, ctx.variant.softcap, ctx.scaling))
            grad_scores.mul_(ctx.scaling)
            group.queries.unpack(product(grad_scores, k), heads_each, grad_query)
            group.keys.add(product(grad_scores.transpose(1, 2), q), 1, grad_key)
            group.keys.add(product(shares.transpose(1, 2), g), 1, grad_value)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _shares(q: Tensor, k: Tensor, group: BlockGroup, variant: Variant, scaling: float) -> Tensor:
    """(B * Hkv, Hq / Hkv * L, keys)"""
    length = group.queries.length
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scaling)
    sinks = variant.sinks
    if sinks is not None:
        by_row = sinks.view(-1, q.shape[1] // length).repeat_interleave(length, 1)  # (Hkv, rows)
        sinks = by_row.repeat(group.queries.count, 1)[..., None]
    mask = group.mask.repeat(q.shape[1] // length, 1)
    return variant.shares(scores, mask, sinks)


def _slope(q: Tensor, k: Tensor, softcap: float, scaling: float) -> Tensor:
    """The derivative of the capped scores by the scores."""
    capped = torch.bmm(q, k.transpose(1, 2)).mul_(scaling / softcap).tanh_()
    return capped.square_().neg_().add_(1)
