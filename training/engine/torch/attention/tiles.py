"""Ranges of one shape, copied side by side, and the tiles into which their queries are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.engine.torch.attention.arithmetic import (
    BLOCK_TOKENS,
    TILE_SCORES,
    causal_mask,
    reach_mask,
    tile_tokens,
)
from training.engine.torch.attention.slots import Slots
from training.engine.torch.attention.variants import EVERYTHING, Reach
from training.engine.torch.packing.ranges import RowRange
from training.engine.torch.packing.stream import round_up

BUCKET_TOKENS = 16
"""Sequences of one bucket begin at multiples of this many rows: at equal places in a vector
register and in a cache line, which affect some kernels' order of summing."""


def most_scores(num_tokens: int, longest: int, reach: Reach, num_heads: int) -> int:
    """The most scores in memory at one time, for so many tokens in sequences up to ``longest``."""
    num_keys = longest
    if reach.limit is not None:
        num_keys = min(longest, reach.limit + 2 * BLOCK_TOKENS + tile_tokens(num_heads, longest))
    of_tile = num_heads * min(longest, tile_tokens(num_heads, num_keys)) * num_keys
    return max(of_tile, min(TILE_SCORES, of_tile * (num_tokens // longest)))


@dataclass(frozen=True, kw_only=True)
class Tile:
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
    tiles: Sequence[Tile]


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
) -> Iterator[Tile]:
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
        yield Tile(start=start, end=end, first_key=first_key, end_key=end_key, mask=mask)
        start = end


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
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
    ) -> Packed:
        return cls(
            queries=bucket.queries.pack(query, query.shape[1] // key.shape[1]).mul_(scaling),
            keys=bucket.keys.pack(key, 1)[:, 0],
            values=bucket.keys.pack(value, 1)[:, 0],
        )

    def part(self, part: slice) -> Packed:
        """Some of the B; nothing is copied."""
        return Packed(queries=self.queries[part], keys=self.keys[part], values=self.values[part])

    def zeros(self) -> Packed:
        return Packed(
            queries=torch.empty_like(self.queries),
            keys=torch.zeros_like(self.keys),
            values=torch.zeros_like(self.values),
        )


def tile_rows(x: Tensor, tile: Tile) -> Tensor:
    """(B, heads * n, D), a tile's rows of x (B, heads, L, D)."""
    return x[:, :, tile.start : tile.end].flatten(1, 2)
