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
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from training.engine.sampler.kv_cache import BLOCK_TOKENS, blocks_for
from training.engine.torch.attention.paged_parts import (
    GROUP_BLOCKS,
    Blocks,
    Part,
    Rows,
    first_block,
    num_shared,
    seen_blocks,
)
from training.engine.torch.attention.variants import EVERYTHING, Reach, Variant

ROWS_MULTIPLE = 4

TILE_TOKENS = 128
"""Most tokens of a prompt whose scores exist at one time."""

TILE_SCORES = 2**24
"""Most scores that exist at one time, unless ``FEWEST_TILE_TOKENS`` have more."""

FEWEST_TILE_TOKENS = 16

FUSES_PLAIN_ON = ("cuda",)
"""Devices on which torch's fused kernel computes layers with plain scores."""


class NewestTokens:
    """One token of each of B sequences, N blocks of each, the first S of which are the same."""

    def __init__(
        self, parts: Sequence[Part], reach: Reach, num_blocks: int, device: torch.device
    ) -> None:
        tables = [list(seen_blocks(part, reach)) for part in parts]
        seen = torch.zeros(len(parts), num_blocks * BLOCK_TOKENS, dtype=torch.bool)
        for i, part in enumerate(parts):
            tables[i] += tables[i][-1:] * (num_blocks - len(tables[i]))  # masked, but its own
            offset = first_block(part.start, reach) * BLOCK_TOKENS
            seen[i, reach.first_key(part.start) - offset : part.end - offset] = True
        self._num_shared = num_shared([seen_blocks(part, reach) for part in parts])
        self._shared = Blocks(tables[0][: self._num_shared], device)
        self._own = Blocks([n for table in tables for n in table[self._num_shared :]], device)
        self._rows = Rows([part.first_row for part in parts], device)
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
        q = self._rows.of(query).unflatten(1, (keys.shape[1], -1))  # (B, Hkv, G, D)
        if query.device.type in FUSES_PLAIN_ON and variant.has_plain_scores:
            attended = self._fused(q, self._all_of(keys), self._all_of(values), scaling)
        else:
            attended = self._by_blocks(q.float() * scaling, keys, values, variant)
        self._rows.write(attended.flatten(1, 2).to(output.dtype), output)

    def _own_of(self, buffer: Tensor) -> Tensor:
        """(B, N - S, Hkv, tokens, D)"""
        own: Tensor = self._own.of(buffer).unflatten(0, (len(self._rows), -1))
        return own

    def _all_of(self, buffer: Tensor) -> Tensor:
        """(B, N, Hkv, tokens, D)"""
        shared = self._shared.of(buffer)[None].expand(len(self._rows), -1, -1, -1, -1)
        return torch.cat([shared, self._own_of(buffer)], dim=1)

    def _by_blocks(self, q: Tensor, keys: Tensor, values: Tensor, variant: Variant) -> Tensor:
        """(B, Hkv, G, D) of q likewise, and the layer's buffers."""
        heads_each, missing = q.shape[2], -q.shape[2] % ROWS_MULTIPLE
        q = pad(q, (0, 0, 0, missing))
        scores = self._scores(q, keys)
        if variant.softcap is not None:
            scores = _capped(scores, variant.softcap)
        scores = (scores + self._mask).flatten(3)  # (B, Hkv, G, N * tokens)
        sinks = variant.sinks
        if sinks is not None:
            sinks = pad(sinks.float().view(-1, heads_each), (0, missing))[..., None]
        shares = softmax(scores, sinks).unflatten(3, (-1, BLOCK_TOKENS))
        return _sum_blocks(self._products(shares, values))[:, :, :heads_each]

    def _scores(self, q: Tensor, keys: Tensor) -> Tensor:
        """(B, Hkv, G, N, tokens)"""
        k = self._own_of(keys).float()
        by_block = q[:, None].expand(-1, k.shape[1], -1, -1, -1).flatten(0, 2)
        own = torch.bmm(by_block, k.flatten(0, 2).transpose(1, 2))
        own = own.view(*k.shape[:3], -1, BLOCK_TOKENS).permute(0, 2, 3, 1, 4)
        if not self._num_shared:
            return own
        k = self._shared.of(keys).float().transpose(0, 1).flatten(1, 2)  # (Hkv, S * tokens, D)
        shared = torch.bmm(q.transpose(0, 1).flatten(1, 2), k.transpose(1, 2))
        shared = shared.view(q.shape[1], len(q), -1, self._num_shared, BLOCK_TOKENS)
        return torch.cat([shared.transpose(0, 1), own], dim=3)

    def _products(self, shares: Tensor, values: Tensor) -> Tensor:
        """(B, N, Hkv, G, D) of shares (B, Hkv, G, N, tokens)."""
        v = self._own_of(values).float()
        own = shares[:, :, :, self._num_shared :].permute(0, 3, 1, 2, 4)
        own = torch.bmm(own.flatten(0, 2), v.flatten(0, 2)).view(*own.shape[:4], -1)
        if not self._num_shared:
            return own
        v = self._shared.of(values).float()
        shared = shares[:, :, :, : self._num_shared].permute(3, 1, 0, 2, 4)  # (S, Hkv, B, G, ..)
        products = torch.bmm(shared.flatten(2, 3).flatten(0, 1), v.flatten(0, 1))
        by_sequence = products.view(*shared.shape[:4], -1).permute(2, 0, 1, 3, 4)
        return torch.cat([by_sequence, own], dim=1)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        k, v = (x.transpose(1, 2).flatten(2, 3) for x in (k, v))  # (B, Hkv, keys, D)
        mask = self._mask.flatten(3).to(q.dtype)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)


class PromptTokens:
    """Several tokens of one sequence."""

    def __init__(self, part: Part, reach: Reach, device: torch.device) -> None:
        self._part = part
        self._reach = EVERYTHING if reach.covers(part.end) else reach
        first = first_block(part.start, self._reach)
        self._first_key = first * BLOCK_TOKENS
        self._blocks = Blocks(part.blocks[first : blocks_for(part.end)], device)
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
