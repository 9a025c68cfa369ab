"""Attention of several tokens of a sequence over the blocks of a cache: those of a prompt.

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
    ROWS_MULTIPLE,
    attend_rows,
    blocks_for,
    causal_mask,
    tile_tokens,
)
from training.engine.torch.attention.paged_parts import (
    Blocks,
    Part,
    Rows,
    first_block,
)
from training.engine.torch.attention.variants import EVERYTHING, Reach, Variant


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
        if variant.is_fused_on(query.device):
            attended = self._fused(q, k, v, scaling)
        else:
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            attended = self._by_tiles(q.float() * scaling, k.float(), v.float(), variant)
            attended = attended.unflatten(0, (self._num_sequences, -1))
        rows = attended.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)  # (B * C, Hq, D)
        if self._kept is not None:
            rows = self._kept.of(rows)
        self._written.write(rows, output)

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
