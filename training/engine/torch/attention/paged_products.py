"""Attention while sampling: over keys and values in the blocks of a cache.

A row's bits are ``arithmetic``'s, in one product with many others or not. On a GPU torch's fused
kernel computes layers with plain scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from training.engine.torch.attention.arithmetic import (
    BLOCK_TOKENS,
    GROUP_BLOCKS,
    ROWS_MULTIPLE,
    attend_rows,
    blocks_for,
    capped,
    causal_mask,
    softmax,
    tile_tokens,
)
from training.engine.torch.attention.paged_parts import (
    Blocks,
    Part,
    Rows,
    first_block,
    num_shared,
    seen_blocks,
)
from training.engine.torch.attention.variants import EVERYTHING, Reach, Variant
from training.engine.torch.to_device import to_device

FUSES_PLAIN_ON = ("cuda",)
"""Devices on which torch's fused kernel computes layers with plain scores."""


class NewestTokens:
    """One token of each of B sequences, N blocks of each, the first S of which are the same."""

    def __init__(
        self, parts: Sequence[Part], reach: Reach, num_blocks: int, device: torch.device
    ) -> None:
        seen = [seen_blocks(part, reach) for part in parts]
        self._num_shared = num_shared(seen)
        self._shared = Blocks(seen[0][: self._num_shared], device)
        own: list[int] = []
        for blocks in seen:
            own += blocks[self._num_shared :]
            # Masked, but the sequence's own.
            own += [blocks[-1]] * (num_blocks - len(blocks))
        self._own = Blocks(own, device)
        self._rows = Rows([part.first_row for part in parts], device)
        mask = to_device(_mask_of(parts, reach, num_blocks), device)
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
            scores = capped(scores, variant.softcap)
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
    """Several tokens of each of B sequences, N blocks of each, from one position on.

    The sequences with fewer tokens than the longest compute some again, which are dropped.
    """

    def __init__(self, parts: Sequence[Part], reach: Reach, device: torch.device) -> None:
        """``parts``: with one start, and ends in the same block."""
        longest = max(parts, key=lambda part: part.num_tokens)
        self._start, self._end = longest.start, longest.end
        self._reach = EVERYTHING if reach.covers(self._end) else reach
        first = first_block(self._start, self._reach)
        self._first_key = first * BLOCK_TOKENS
        self._blocks = Blocks(
            [n for part in parts for n in part.blocks[first : blocks_for(part.end)]], device
        )
        self._num_sequences = len(parts)
        self._num_tokens = longest.num_tokens
        self._device = device
        read = [
            part.first_row + min(n, part.num_tokens - 1)
            for part in parts
            for n in range(self._num_tokens)
        ]
        self._read = Rows(read, device)
        self._written, self._kept = self._read, None
        if any(part.num_tokens < self._num_tokens for part in parts):
            own = [
                (part.first_row + n, i * self._num_tokens + n)
                for i, part in enumerate(parts)
                for n in range(part.num_tokens)
            ]
            self._written = Rows([row for row, _ in own], device)
            self._kept = Rows([number for _, number in own], device)

    @cached_property
    def _mask(self) -> Tensor:
        """(C, keys) float32: 0 where a token sees a key, else minus infinity."""
        queries = torch.arange(self._start, self._end, device=self._device)
        num_keys = len(self._blocks) // self._num_sequences * BLOCK_TOKENS
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
        q = self._read.of(query).unflatten(1, (keys.shape[1], -1))  # (B * C, Hkv, G, D)
        q = q.unflatten(0, (self._num_sequences, -1)).permute(0, 2, 3, 1, 4)  # (B, Hkv, G, C, D)
        k, v = self._of_each(keys), self._of_each(values)  # (B, Hkv, keys, D)
        if query.device.type in FUSES_PLAIN_ON and variant.has_plain_scores:
            attended = self._fused(q, k, v, scaling)
        else:
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            attended = self._by_tiles(q.float() * scaling, k.float(), v.float(), variant)
            attended = attended.unflatten(0, (self._num_sequences, -1))
        rows = attended.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)  # (B * C, Hq, D)
        if self._kept is not None:
            rows = self._kept.of(rows)
        self._written.write(rows.to(output.dtype), output)

    def _of_each(self, buffer: Tensor) -> Tensor:
        """(B, Hkv, keys, D)"""
        blocks = self._blocks.of(buffer).unflatten(0, (self._num_sequences, -1))
        each: Tensor = blocks.transpose(1, 2).flatten(2, 3)
        return each

    def _by_tiles(self, q: Tensor, k: Tensor, v: Tensor, variant: Variant) -> Tensor:
        """(B * Hkv, G, C, D) of q likewise, k and v (B * Hkv, keys, D)."""
        num_heads, heads_each, num_tokens, _ = q.shape
        size = tile_tokens(num_heads * heads_each, k.shape[1])
        tiles = []
        for start in range(0, num_tokens, size):
            end = min(start + size, num_tokens)
            first = self._start + start - self._first_key
            num_keys = blocks_for(self._start + end - self._first_key) * BLOCK_TOKENS
            if self._reach == EVERYTHING:
                mask = causal_mask(end - start, num_keys - first, self._device)
            else:
                mask = self._mask[start:end, :num_keys]
            rows = q[:, :, start:end].flatten(1, 2)
            rows = pad(rows, (0, 0, 0, -rows.shape[1] % ROWS_MULTIPLE))
            attended, _ = attend_rows(
                rows,
                k[:, :num_keys],
                v[:, :num_keys],
                mask,
                variant,
                heads_each=heads_each,
                first_block=self._first_key // BLOCK_TOKENS,
            )
            own = attended[:, : heads_each * (end - start)]
            tiles.append(own.unflatten(1, (heads_each, end - start)))
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=2)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        heads_each = q.shape[2]
        attended = scaled_dot_product_attention(
            q.flatten(1, 2),  # (B, Hq, C, D)
            k,
            v,
            attn_mask=self._mask.to(q.dtype),
            scale=scaling,
            enable_gqa=heads_each != 1,
        )
        by_head: Tensor = attended.unflatten(1, (-1, heads_each))
        return by_head


def _mask_of(parts: Sequence[Part], reach: Reach, num_blocks: int) -> Tensor:
    """(B, keys) float32: 0 where the newest token of a sequence sees a key of the blocks that begin
    with its first visible one, else minus infinity."""
    seen = [
        (reach.first_key(part.start) - offset, part.end - offset)
        for part in parts
        for offset in [first_block(part.start, reach) * BLOCK_TOKENS]
    ]
    first, end = torch.tensor(seen).T[..., None]  # (B, 1) each
    keys = torch.arange(num_blocks * BLOCK_TOKENS)
    mask = torch.zeros(len(parts), len(keys))
    return mask.masked_fill_((keys < first) | (keys >= end), -math.inf)


def _sum_blocks(products: Tensor) -> Tensor:
    """(B, ...) the sum of (B, N, ...) over N blocks, in ``arithmetic``'s order."""
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
