"""Attention while sampling: over keys and values in the blocks of a cache.

A query row's result has the same bits whether its token is read in a prompt, sampled, or read again
after its blocks were lost, whatever precedes it in the cache already, and whatever shares the pass.
So there is one arithmetic, in float32, for all of these rows:

1. scores: a product of one query row with each key;
2. shares: a softmax over the scores of whole blocks, in which keys that the row does not see are
   minus infinity;
3. for each block, the product of its shares and its values;
4. the sum of these products in groups of ``GROUP_BLOCKS`` blocks, counted from the sequence's
   first block, each group from left to right, and then over the groups from left to right.

Blocks without a visible key may be left out or added: they add exact zeros. Matrix products get
rows in multiples of ``ROWS_MULTIPLE`` and never more than one block of values, because only then
do the bits of a row not depend on the number of rows (measured with MKL, one thread and two).

On a GPU torch's fused kernel computes layers with plain scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from training.engine.sampler.kv_cache import BLOCK_TOKENS, KvCache, blocks_for
from training.engine.torch.attention.interface import Attention
from training.engine.torch.attention.variants import EVERYTHING, PLAIN, Reach, Variant
from training.engine.torch.packing.stream import round_up

GROUP_BLOCKS = 8
"""Blocks whose products are added to each other first."""

ROWS_MULTIPLE = 4

GATHERED_BLOCKS = 256
"""Most blocks of keys that are copied for a product, unless one sequence has more: a copy should
fit into a processor's cache."""

TILE_TOKENS = 128
"""Most tokens of a prompt whose scores exist at one time."""

TILE_SCORES = 2**24
"""Most scores that exist at one time, unless ``FEWEST_TILE_TOKENS`` have more."""

FEWEST_TILE_TOKENS = 16

FUSES_PLAIN_ON = ("cuda",)
"""Devices on which torch's fused kernel computes layers with plain scores."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Adjacent rows of a pass: the next tokens of one sequence."""

    first_row: int
    start: int
    """The number of the sequence's tokens that are in the cache already."""
    num_tokens: int
    blocks: Sequence[int]
    """The blocks of the sequence, from its first token to the last of these."""

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class PagedAttention(Attention):
    """The next tokens of each of some sequences; other rows are padding and get zeros."""

    def __init__(self, cache: KvCache, parts: Sequence[Part], num_rows: int) -> None:
        self._cache = cache
        self._parts = parts
        self._longest = max((part.end for part in parts), default=0)
        self._plans: dict[Reach, _Plan] = {}
        rows = [part.first_row + n for part in parts for n in range(part.num_tokens)]
        self.real_rows = None if len(rows) == num_rows else torch.tensor(rows, device=cache.device)
        """The rows that are not padding, (n,) int64; None if all are real, in order."""
        places = [
            (part.blocks[n // BLOCK_TOKENS], n % BLOCK_TOKENS)
            for part in parts
            for n in range(part.start, part.end)
        ]
        self._places = torch.tensor(places, device=cache.device)  # (n, 2)
        self._places_by_heads: dict[int, Tensor] = {}

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        variant: Variant = PLAIN,
    ) -> Tensor:
        if self.real_rows is not None:
            key, value = key[self.real_rows], value[self.real_rows]
        self._cache.store(layer_idx, self._places_of(key.shape[1]), key, value)
        keys, values = self._cache.blocks(layer_idx)
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        plan = self._plan(variant.reach)
        for chunk in plan.chunks:
            chunk.attend(keys, values, query, scaling, variant, output)
        for newest in plan.newest:
            newest.attend(keys, values, query, scaling, variant, output)
        return output  # (T, Hq, D)

    def _places_of(self, num_key_heads: int) -> Tensor:
        """Where the cache stores the rows: see ``KvCache.store``."""
        if num_key_heads not in self._places_by_heads:
            heads = torch.arange(num_key_heads, device=self._cache.device)
            block, token = self._places.unbind(1)
            places = (block[:, None] * num_key_heads + heads) * BLOCK_TOKENS + token[:, None]
            self._places_by_heads[num_key_heads] = places.flatten()
        return self._places_by_heads[num_key_heads]

    def _plan(self, reach: Reach) -> _Plan:
        if reach.covers(self._longest):
            reach = EVERYTHING
        if reach not in self._plans:
            self._plans[reach] = _Plan.of(self._parts, reach, self._cache.device)
        return self._plans[reach]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """The computation of a pass in the layers of one reach."""

    chunks: list[_Chunk]
    newest: list[_Newest]

    @classmethod
    def of(cls, parts: Sequence[Part], reach: Reach, device: torch.device) -> _Plan:
        chunks = [_Chunk(part, reach, device) for part in parts if part.num_tokens > 1]
        alike: dict[int, list[Part]] = {}
        for part in parts:
            if part.num_tokens == 1:
                alike.setdefault(_padded(_num_seen(part, reach)), []).append(part)
        newest = []
        for size, some in alike.items():
            at_once = max(1, GATHERED_BLOCKS // size)
            for i in range(0, len(some), at_once):
                newest.append(_Newest(some[i : i + at_once], reach, size, device))
        return cls(chunks=chunks, newest=newest)


def _first_block(position: int, reach: Reach) -> int:
    """The first block of the first group of which the token at ``position`` sees something."""
    return reach.first_key(position) // BLOCK_TOKENS // GROUP_BLOCKS * GROUP_BLOCKS


def _num_seen(part: Part, reach: Reach) -> int:
    return blocks_for(part.end) - _first_block(part.start, reach)


def _padded(num_blocks: int) -> int:
    """Sequences of so many blocks share products."""
    return num_blocks if num_blocks <= GROUP_BLOCKS else round_up(num_blocks, GROUP_BLOCKS)


class _Newest:
    """One token of each of B sequences, N blocks of each."""

    def __init__(
        self, parts: Sequence[Part], reach: Reach, num_blocks: int, device: torch.device
    ) -> None:
        self._num_blocks = num_blocks
        blocks = []
        seen = torch.zeros(len(parts), num_blocks * BLOCK_TOKENS, dtype=torch.bool)
        for i, part in enumerate(parts):
            first = _first_block(part.start, reach)
            own = list(part.blocks[first : blocks_for(part.end)])
            blocks += own + own[-1:] * (num_blocks - len(own))  # masked, but its own
            offset = first * BLOCK_TOKENS
            seen[i, reach.first_key(part.start) - offset : part.end - offset] = True
        self._rows = torch.tensor([part.first_row for part in parts], device=device)
        self._blocks = _Blocks(blocks, device)
        mask = torch.zeros(seen.shape).masked_fill_(~seen, -math.inf).to(device)
        self._mask = mask.view(len(parts), 1, 1, num_blocks, BLOCK_TOKENS)

    def attend(
        self,
        keys: Tensor,
        values: Tensor,
        query: Tensor,
        scaling: float,
        variant: Variant,
        output: Tensor,
    ) -> None:
        """Write these tokens' rows of ``output`` (T, Hq, D), like ``query``'s."""
        num_sequences, num_heads = len(self._rows), keys.shape[1]
        q = query.index_select(0, self._rows).unflatten(1, (num_heads, -1))  # (B, Hkv, G, D)
        each = (num_sequences, self._num_blocks, *keys.shape[1:])
        k = self._blocks.of(keys).view(each)
        v = self._blocks.of(values).view(*each[:-1], values.shape[-1])
        if query.device.type in FUSES_PLAIN_ON and variant.has_plain_scores:
            attended = self._fused(q, k, v, scaling)
        else:
            attended = self._by_blocks(q, k.float(), v.float(), scaling, variant)
        output.index_copy_(0, self._rows, attended.flatten(1, 2).to(output.dtype))

    def _by_blocks(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, variant: Variant
    ) -> Tensor:
        """(B, Hkv, G, D) of q likewise, and k and v (B, N, Hkv, tokens, D)."""
        heads_each, missing = q.shape[2], -q.shape[2] % ROWS_MULTIPLE
        q = pad(q.float() * scaling, (0, 0, 0, missing))
        by_block = q[:, None].expand(-1, self._num_blocks, -1, -1, -1).flatten(0, 2)
        scores = torch.bmm(by_block, k.flatten(0, 2).transpose(1, 2))
        scores = scores.view(*k.shape[:3], -1, BLOCK_TOKENS).permute(0, 2, 3, 1, 4)
        if variant.softcap is not None:
            scores = _capped(scores, variant.softcap)
        scores = (scores + self._mask).flatten(3)  # (B, Hkv, G, N * tokens)
        sinks = variant.sinks
        if sinks is not None:
            sinks = pad(sinks.float().view(-1, heads_each), (0, missing))[..., None]
        shares = softmax(scores, sinks).unflatten(3, (-1, BLOCK_TOKENS))
        shares = shares.permute(0, 3, 1, 2, 4).reshape(-1, *shares.shape[2:3], BLOCK_TOKENS)
        products = torch.bmm(shares, v.flatten(0, 2))
        return _sum_blocks(products.view(*k.shape[:3], *products.shape[1:]))[:, :, :heads_each]

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        k, v = (x.transpose(1, 2).flatten(2, 3) for x in (k, v))  # (B, Hkv, keys, D)
        mask = self._mask.flatten(3).to(q.dtype)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)


class _Chunk:
    """Several tokens of one sequence."""

    def __init__(self, part: Part, reach: Reach, device: torch.device) -> None:
        self._part = part
        self._reach = EVERYTHING if reach.covers(part.end) else reach
        first = _first_block(part.start, self._reach)
        self._first_key = first * BLOCK_TOKENS
        self._blocks = _Blocks(part.blocks[first : blocks_for(part.end)], device)
        self._device = device

    @cached_property
    def _mask(self) -> Tensor:
        """(C, keys) float32: 0 where a token sees a key, else minus infinity."""
        queries = torch.arange(self._part.start, self._part.end, device=self._device)
        num_keys = len(self._blocks) * BLOCK_TOKENS
        keys = torch.arange(self._first_key, self._first_key + num_keys, device=self._device)
        mask = torch.zeros(len(queries), num_keys, device=self._device)
        return mask.masked_fill_(~self._reach.sees(queries, keys), -math.inf)

    def attend(
        self,
        keys: Tensor,
        values: Tensor,
        query: Tensor,
        scaling: float,
        variant: Variant,
        output: Tensor,
    ) -> None:
        """Write these tokens' rows of ``output`` (T, Hq, D), like ``query``'s."""
        num_heads = keys.shape[1]
        rows = slice(self._part.first_row, self._part.first_row + self._part.num_tokens)
        q = query[rows].unflatten(1, (num_heads, -1)).permute(1, 2, 0, 3)  # (Hkv, G, C, D)
        k, v = self._blocks.of(keys), self._blocks.of(values)  # (N, Hkv, tokens, D)
        k = k.transpose(0, 1).flatten(1, 2)  # (Hkv, keys, D)
        if query.device.type in FUSES_PLAIN_ON and variant.has_plain_scores:
            attended = self._fused(q, k, v, scaling)
        else:
            attended = self._by_tiles(q.float() * scaling, k.float(), v.float(), variant)
        output[rows] = attended.permute(2, 0, 1, 3).flatten(1, 2).to(output.dtype)

    def _by_tiles(self, q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> Tensor:
        """(Hkv, G, C, D)"""
        scores_each = q.shape[0] * q.shape[1] * k.shape[1]
        size = min(TILE_TOKENS, max(FEWEST_TILE_TOKENS, TILE_SCORES // scores_each))
        tiles = []
        for start in range(0, q.shape[2], size):
            end = min(start + size, q.shape[2])
            num_blocks = blocks_for(self._part.start + end - self._first_key)
            num_keys = num_blocks * BLOCK_TOKENS
            mask = self._mask[start:end, :num_keys]
            tiles.append(
                _attend_tile(q[:, :, start:end], k[:, :num_keys], v[:num_blocks], mask, variant)
            )
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=2)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        num_heads, heads_each = q.shape[:2]
        attended = scaled_dot_product_attention(
            q.flatten(0, 1)[None],  # (1, Hq, C, D)
            k[None],
            v.transpose(0, 1).flatten(1, 2)[None],
            attn_mask=self._mask.to(q.dtype),
            scale=scaling,
            enable_gqa=heads_each != 1,
        )
        by_head: Tensor = attended[0].unflatten(0, (num_heads, heads_each))
        return by_head


def _attend_tile(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, variant: Variant) -> Tensor:
    """(Hkv, G, n, D) of q likewise, k (Hkv, keys, D), v (N, Hkv, tokens, D), mask (n, keys)."""
    shape = q.shape[1:3]
    num_rows = shape.numel()
    missing = -num_rows % ROWS_MULTIPLE
    rows = pad(q.flatten(1, 2), (0, 0, 0, missing))
    scores = torch.bmm(rows, k.transpose(1, 2))  # (Hkv, rows, keys)
    if variant.softcap is not None:
        scores = _capped(scores, variant.softcap)
    scores[:, :num_rows].unflatten(1, shape).add_(mask)
    sinks = variant.sinks
    if sinks is not None:
        sinks = sinks.float().view(len(q), -1).repeat_interleave(shape[1], 1)
        sinks = pad(sinks, (0, missing))[..., None]
    shares = softmax(scores, sinks)
    total = _weigh(shares, v[:GROUP_BLOCKS])
    for first in range(GROUP_BLOCKS, len(v), GROUP_BLOCKS):
        rest = shares[..., first * BLOCK_TOKENS :]
        total.add_(_weigh(rest, v[first : first + GROUP_BLOCKS]))
    attended: Tensor = total[:, :num_rows].unflatten(1, shape)
    return attended


def _weigh(shares: Tensor, v: Tensor) -> Tensor:
    """The sum over a group of blocks v (N, Hkv, tokens, D) of their products with the first of
    these shares (Hkv, rows, keys)."""
    total = torch.bmm(shares[..., :BLOCK_TOKENS], v[0])
    for i in range(1, len(v)):
        total.add_(torch.bmm(shares[..., i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS], v[i]))
    return total


class _Blocks:
    """Blocks of a cache, one after another."""

    def __init__(self, blocks: Sequence[int], device: torch.device) -> None:
        self._numbers = blocks
        first = blocks[0]
        self._are_neighbours = list(blocks) == list(range(first, first + len(blocks)))
        self._ids = torch.tensor(blocks, device=device)

    def __len__(self) -> int:
        return len(self._numbers)

    def of(self, buffer: Tensor) -> Tensor:
        """(n, Hkv, tokens, D); not copied if they are neighbours in the cache."""
        if self._are_neighbours:
            return buffer[self._numbers[0] : self._numbers[0] + len(self._numbers)]
        return buffer.index_select(0, self._ids)


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The softmax over the last dimension; sinks (..., 1) are part of its sum, without a value."""
    if sinks is None:
        return scores.softmax(-1)
    # A whole block before the first, so that every key keeps its place among the lanes of a sum.
    before = scores.new_full((*scores.shape[:-1], BLOCK_TOKENS), -math.inf)
    before[..., :1] = sinks
    return torch.cat([before, scores], dim=-1).softmax(-1)[..., BLOCK_TOKENS:]


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return (scores / softcap).tanh_().mul_(softcap)


def _sum_blocks(products: Tensor) -> Tensor:
    """(B, ...) the sum of (B, N, ...) over N blocks, in the order that this module promises."""
    if products.shape[1] == 1:
        return products[:, 0]
    size = min(products.shape[1], GROUP_BLOCKS)
    groups: Tensor = products.unflatten(1, (-1, size))  # (B, N / size, size, ...)
    sums = groups[:, :, 0] + groups[:, :, 1]
    for i in range(2, size):
        sums.add_(groups[:, :, i])
    total = sums[:, 0]
    for i in range(1, sums.shape[1]):
        total.add_(sums[:, i])
    return total
