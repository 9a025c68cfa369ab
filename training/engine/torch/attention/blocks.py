"""Attention of whole sequences of a packed stream, with its derivative.

The forward part has ``arithmetic``'s order of sums, so that a token's log-probability is that of
the sampler. Ranges of one padded length after equally many tokens share batched products,
wherever they are in the stream. The products' shapes depend on a range's own sequence
alone, so batch-mates do not change its bits, forwards or backwards (measured with MKL, one
thread and two).

Queries are cut into tiles; a tile uses only the blocks of keys of which one of its tokens
sees something, so a layer with a window costs the same for each token of a sequence of any length.
For sequences of more than ``KEPT_KEYS`` tokens only the inputs are kept for the backward pass,
which computes the scores again: they would be most of a long sequence's memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from training.engine.torch.attention.arithmetic import (
    BLOCK_TOKENS,
    TILE_SCORES,
    attend_rows,
    capped,
    causal_mask,
    reach_mask,
    tile_tokens,
)
from training.engine.torch.attention.slots import Slots
from training.engine.torch.attention.variants import EVERYTHING, Reach, Variant
from training.engine.torch.packing.ranges import RowRange
from training.engine.torch.packing.stream import round_up
from training.engine.torch.thread_team import ThreadTeam, cut

KEPT_KEYS = 192
"""The shares of sequences of up to this many tokens are kept for the backward pass."""

BUCKET_TOKENS = 16
"""Sequences of one bucket begin at multiples of this many rows: at equal places in a vector
register and in a cache line, which affect some kernels' order of summing."""

PART_SCORES = 2**16
"""Fewest scores of a part that another thread computes."""

NARROW = 16
"""Matrix products with fewer columns than this take up to four times longer than transposed."""


def most_scores(num_tokens: int, longest: int, reach: Reach, num_heads: int) -> int:
    """The most scores in memory at one time, for so many tokens in sequences up to ``longest``."""
    num_keys = longest
    if reach.limit is not None:
        num_keys = min(longest, reach.limit + 2 * BLOCK_TOKENS + tile_tokens(num_heads, longest))
    of_tile = num_heads * min(longest, tile_tokens(num_heads, num_keys)) * num_keys
    return max(of_tile, min(TILE_SCORES, of_tile * (num_tokens // longest)))


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """Adjacent queries of a bucket's ranges, and the keys of which they see something."""

    start: int
    """The first query, counted from the range's first token."""
    end: int
    first_key: int
    """Counted from the sequence's first token; a multiple of ``BLOCK_TOKENS``."""
    end_key: int
    mask: Tensor
    """(end - start, m): 0 where a query sees one of the last m keys, else minus infinity."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bucket:
    """Ranges of one padded length after equally many tokens."""

    queries: Slots
    keys: Slots
    """All that the ranges see, from the first token of their sequences on."""
    tiles: Sequence[_Tile]


def make_buckets(
    row_ranges: Sequence[RowRange], reach: Reach, num_heads: int, device: torch.device
) -> list[Bucket]:
    """The ranges, those of one shape together, in an order that does not depend on the stream."""
    members: dict[tuple[int, int], list[RowRange]] = {}
    for row_range in row_ranges:
        shape = (row_range.num_before, padded_length(row_range.length))
        members.setdefault(shape, []).append(row_range)
    buckets = []
    for (num_before, length), alike in sorted(members.items(), key=lambda item: item[0]):
        tiles = list(_tiles(num_before, length, reach, num_heads, device))
        most = max((tile.end - tile.start) * (tile.end_key - tile.first_key) for tile in tiles)
        at_once = max(1, TILE_SCORES // (num_heads * most))
        num_keys = round_up(num_before + length, BLOCK_TOKENS)
        for start in range(0, len(alike), at_once):
            some = alike[start : start + at_once]
            queries = Slots.of([(each,) for each in some], length, device)
            keys = Slots.of([each.seen for each in some], num_keys, device)
            buckets.append(Bucket(queries=queries, keys=keys, tiles=tiles))
    return buckets


def padded_length(length: int) -> int:
    return round_up(length, BUCKET_TOKENS)


def _tiles(
    num_before: int, length: int, reach: Reach, num_heads: int, device: torch.device
) -> Iterator[_Tile]:
    start = 0
    while start < length:
        first = num_before + start  # its position
        first_key = reach.first_key(first) // BLOCK_TOKENS * BLOCK_TOKENS
        most_keys = first - first_key + BLOCK_TOKENS
        end = min(length, start + tile_tokens(num_heads, most_keys))
        end_key = round_up(num_before + end, BLOCK_TOKENS)
        own = reach
        if reach.first_key(num_before + end - 1) == 0:
            own = EVERYTHING
        if own == EVERYTHING:
            mask = causal_mask(end - start, end_key - first, device)
        else:
            # Relative positions: tiles of long sequences have the same masks again and again.
            moved = first_key if own.chunk is None else first_key // own.chunk * own.chunk
            mask = reach_mask(
                own, first - moved, end - start, first_key - moved, end_key - first_key, device
            )
        yield _Tile(start=start, end=end, first_key=first_key, end_key=end_key, mask=mask)
        start = end


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    buckets: Sequence[Bucket],
    variant: Variant,
    scaling: float,
    *,
    kept_keys: int = KEPT_KEYS,
    team: ThreadTeam | None = None,
) -> Tensor:
    """Attention of the rows of all buckets; zero for other rows.

    Args:
        query: (T, Hq, D).
        key: (T, Hkv, D), and ``value`` likewise.
        kept_keys: See ``KEPT_KEYS``.
        team: Computes parts of each bucket; None does it in this thread.

    Returns:
        (T, Hq, D), in the queries' dtype.
    """
    output: Tensor = _BlockAttention.apply(  # type: ignore[no-untyped-call]  # torch has no types
        query, key, value, buckets, variant, scaling, kept_keys, team or ThreadTeam()
    )
    return output


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        buckets: Sequence[Bucket],
        variant: Variant,
        scaling: float,
        kept_keys: int,
        team: ThreadTeam,
    ) -> Tensor:
        ctx.buckets, ctx.variant, ctx.scaling = buckets, variant, scaling
        ctx.key_shape = key.shape
        ctx.kept_keys, ctx.team = kept_keys, team
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        kept: list[Tensor] = []
        if any(bucket.keys.length > kept_keys for bucket in buckets):
            kept += [query, key, value]
        for bucket in buckets:
            packed = _Packed.of(bucket, query, key, value, scaling=scaling)
            attended = torch.empty_like(packed.queries)
            is_kept = bucket.keys.length <= kept_keys and any(ctx.needs_input_grad)
            if is_kept:
                kept += [packed.queries, packed.keys, packed.values]
            shares = [packed.empty_shares(tile) if is_kept else None for tile in bucket.tiles]
            kept += [each for each in shares if each is not None]
            team.run(
                [
                    partial(
                        _attend,
                        packed.part(part),
                        attended[part],
                        None if each is None else each[part],
                        tile,
                        variant,
                    )
                    for part in _parts(packed, bucket, variant, team)
                    for tile, each in zip(bucket.tiles, shares, strict=True)
                ]
            )
            bucket.queries.unpack(attended, output)
        ctx.save_for_backward(*kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        kept = iter(ctx.saved_tensors)  # may be read only once, where they were computed again
        inputs: tuple[Tensor, ...] = ()
        if any(bucket.keys.length > ctx.kept_keys for bucket in ctx.buckets):
            inputs = (next(kept), next(kept), next(kept))
        grad_query = torch.zeros_like(grad_output, memory_format=torch.contiguous_format)
        # A key that many ranges see has a gradient from each, so the sum is kept in float32.
        grad_key = grad_output.new_zeros(ctx.key_shape, dtype=torch.float32)
        grad_value = torch.zeros_like(grad_key)
        for bucket in ctx.buckets:
            is_kept = bucket.keys.length <= ctx.kept_keys
            if is_kept:
                packed = _Packed(queries=next(kept), keys=next(kept), values=next(kept))
            else:
                packed = _Packed.of(bucket, *inputs, scaling=ctx.scaling)
            shares = [next(kept) if is_kept else None for _ in bucket.tiles]
            grads = packed.zeros()
            packed_grad = bucket.queries.pack(grad_output, packed.queries.shape[1])
            ctx.team.run(
                [
                    partial(
                        _add_gradients,
                        packed.part(part),
                        grads.part(part),
                        packed_grad[part],
                        bucket.tiles,
                        [None if each is None else each[part] for each in shares],
                        ctx.variant,
                    )
                    for part in _parts(packed, bucket, ctx.variant, ctx.team)
                ]
            )
            bucket.queries.unpack(grads.queries.mul_(ctx.scaling), grad_query)
            bucket.keys.add(grads.keys[:, None], grad_key)
            bucket.keys.add(grads.values[:, None], grad_value)
        dtype = grad_output.dtype
        grads_of_inputs = (grad_query, grad_key.to(dtype), grad_value.to(dtype))
        return (*grads_of_inputs, None, None, None, None, None)


def _parts(packed: _Packed, bucket: Bucket, variant: Variant, team: ThreadTeam) -> list[slice]:
    """The parts of a bucket's B ranges and key heads that the team computes."""
    count = len(packed.keys)
    tile = bucket.tiles[-1]
    num_scores = packed.queries.shape[1] * (tile.end - tile.start) * (tile.end_key - tile.first_key)
    if variant.sinks is not None or count * num_scores < PART_SCORES * 2:
        return [slice(0, count)]  # sinks are those of all key heads
    return cut(count, min(count, team.most_parts))


def _attend(
    packed: _Packed, attended: Tensor, kept: Tensor | None, tile: _Tile, variant: Variant
) -> None:
    """Write a tile's rows of the output (B, heads, L, D), and its shares, if they are kept."""
    rows, shares = packed.attend(tile, variant)
    attended[:, :, tile.start : tile.end] = rows
    if kept is not None:
        kept.copy_(shares)


def _add_gradients(
    packed: _Packed,
    grads: _Packed,
    grad_output: Tensor,
    tiles: Sequence[_Tile],
    shares: Sequence[Tensor | None],
    variant: Variant,
) -> None:
    """Add all tiles' gradients; shares that were not kept are computed again."""
    for tile, kept in zip(tiles, shares, strict=True):
        own = packed.attend(tile, variant)[1] if kept is None else kept
        packed.add_gradients(grads, grad_output, tile, own, variant)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Packed:
    """A bucket's numbers, or their gradients, all float32; B is its ranges times key heads."""

    queries: Tensor
    """(B, heads, L, D), scaled"""
    keys: Tensor
    """(B, K, D)"""
    values: Tensor
    """(B, K, D)"""

    @classmethod
    def of(
        cls, bucket: Bucket, query: Tensor, key: Tensor, value: Tensor, *, scaling: float
    ) -> _Packed:
        return cls(
            queries=bucket.queries.pack(query, query.shape[1] // key.shape[1]).mul_(scaling),
            keys=bucket.keys.pack(key, 1)[:, 0],
            values=bucket.keys.pack(value, 1)[:, 0],
        )

    def part(self, part: slice) -> _Packed:
        """Some of the B; nothing is copied."""
        return _Packed(queries=self.queries[part], keys=self.keys[part], values=self.values[part])

    def zeros(self) -> _Packed:
        return _Packed(
            queries=torch.empty_like(self.queries),
            keys=torch.zeros_like(self.keys),
            values=torch.zeros_like(self.values),
        )

    def empty_shares(self, tile: _Tile) -> Tensor:
        """(B, heads * n, keys)"""
        num_rows = self.queries.shape[1] * (tile.end - tile.start)
        return self.keys.new_empty(len(self.keys), num_rows, tile.end_key - tile.first_key)

    def attend(self, tile: _Tile, variant: Variant) -> tuple[Tensor, Tensor]:
        """(B, heads, n, D), and the shares (B, heads * n, keys)."""
        keys = slice(tile.first_key, tile.end_key)
        rows, shares = attend_rows(
            _rows(self.queries, tile),
            self.keys[:, keys],
            self.values[:, keys],
            tile.mask,
            variant,
            heads_each=self.queries.shape[1],
            first_block=tile.first_key // BLOCK_TOKENS,
        )
        return rows.unflatten(1, (-1, tile.end - tile.start)), shares

    def add_gradients(
        self, grads: _Packed, grad_output: Tensor, tile: _Tile, shares: Tensor, variant: Variant
    ) -> None:
        """Add to ``grads`` those of a tile, from its shares and that of the output
        (B, heads, L, D); the queries' is that of the scaled ones, and is written."""
        span = slice(tile.first_key, tile.end_key)
        q, g = _rows(self.queries, tile), _rows(grad_output, tile)
        k, v = self.keys[:, span], self.values[:, span]
        grad_shares = torch.bmm(g, v.transpose(1, 2))
        # The derivative of a softmax; a sink is part of its sum, but contributes no value.
        grad_scores = torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
        if variant.softcap is not None:
            slope = capped(torch.bmm(q, k.transpose(1, 2)), variant.softcap)
            grad_scores.mul_(slope.div_(variant.softcap).square_().neg_().add_(1))
        by_head = _product(grad_scores, k).unflatten(1, (-1, tile.end - tile.start))
        grads.queries[:, :, tile.start : tile.end] = by_head
        grads.keys[:, span].add_(_product(grad_scores.transpose(1, 2), q))
        grads.values[:, span].add_(_product(shares.transpose(1, 2), g))


def _rows(x: Tensor, tile: _Tile) -> Tensor:
    """(B, heads * n, D), a tile's rows of x (B, heads, L, D)."""
    return x[:, :, tile.start : tile.end].flatten(1, 2)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Batched left @ right."""
    if right.shape[2] >= NARROW:
        return torch.bmm(left, right)
    return torch.bmm(right.transpose(1, 2), left.transpose(1, 2)).transpose(1, 2)
