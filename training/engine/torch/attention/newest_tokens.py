"""Attention of the newest token of each of some sequences over the blocks of a cache.

A row's bits are ``arithmetic``'s, in one product with many others or not. On a GPU torch's fused
kernel computes layers with plain scores.

A step that samples takes longer for its operators than for its numbers, so all layers of a pass
write to the same buffers, whose views are made once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from training.engine.torch.attention.arithmetic import (
    BLOCK_TOKENS,
    GROUP_BLOCKS,
    ROWS_MULTIPLE,
    Workspace,
    capped,
    softmax,
)
from training.engine.torch.attention.paged_parts import (
    Blocks,
    Part,
    Rows,
    first_block,
    num_shared,
    seen_blocks,
)
from training.engine.torch.attention.variants import Reach, Variant
from training.engine.torch.packing.stream import round_up
from training.engine.torch.to_device import to_device


class NewestTokens:
    """One token of each of B sequences, N blocks of each, the first S of which are the same."""

    def __init__(
        self,
        parts: Sequence[Part],
        reach: Reach,
        num_blocks: int,
        device: torch.device,
        workspace: Workspace,
    ) -> None:
        """
        Args:
            num_blocks: N, at least the blocks that any of them sees.
            workspace: Of tokens that are never computed at the same time.
        """
        seen = [seen_blocks(part, reach) for part in parts]
        self._num_blocks = num_blocks
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
        self._workspace = workspace
        self._buffers: dict[tuple[int, ...], _Buffers] = {}

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
        q = self._rows.of(query).unflatten(1, (num_heads, -1))  # (B, Hkv, G, D)
        if variant.is_fused_on(query.device):
            attended = self._fused(q, self._all_of(keys), self._all_of(values), scaling)
        else:
            buffers = self._buffers_for(num_heads, q.shape[2], keys.shape[3], values.shape[3], q)
            buffers.queries.copy_(q).mul_(scaling)
            self._write_scores(buffers, keys)
            self._write_shares(buffers, variant)
            self._write_products(buffers, values)
            attended = buffers.sum_of_blocks()
        self._rows.write(attended, output.unflatten(1, (num_heads, -1)))

    def _all_of(self, buffer: Tensor) -> Tensor:
        """(B, N, Hkv, tokens, D)"""
        shared = self._shared.of(buffer)[None].expand(len(self._rows), -1, -1, -1, -1)
        own = self._own.of(buffer).unflatten(0, (len(self._rows), -1))
        return torch.cat([shared, own], dim=1)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        k, v = (x.transpose(1, 2).flatten(2, 3) for x in (k, v))  # (B, Hkv, keys, D)
        mask = self._mask.flatten(3).to(q.dtype)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)

    def _buffers_for(
        self, num_heads: int, heads_each: int, key_size: int, value_size: int, like: Tensor
    ) -> _Buffers:
        shape = (num_heads, heads_each, key_size, value_size)
        if shape not in self._buffers:
            sizes = (len(self._rows), self._num_blocks, self._num_shared)
            self._buffers[shape] = _Buffers(self._workspace, like, *sizes, *shape)
        return self._buffers[shape]

    def _write_scores(self, buffers: _Buffers, keys: Tensor) -> None:
        k = buffers.floats(self._own.of(keys))  # (B * own blocks * Hkv, tokens, D)
        if buffers.own_queries is not None:
            buffers.own_queries.copy_(buffers.queries_by_block)
        torch.bmm(buffers.own_rows, k.transpose(1, 2), out=buffers.own_scores)
        if buffers.own_part_of_scores is not None:
            buffers.own_part_of_scores.copy_(buffers.own_scores_by_head)
        if self._num_shared:
            k = self._shared.of(keys).float().transpose(0, 1).flatten(1, 2)  # (Hkv, keys, D)
            rows = buffers.all_queries.transpose(0, 1).flatten(1, 2)  # (Hkv, B * R, D)
            shared = torch.bmm(rows, k.transpose(1, 2))
            by_sequence = shared.view(buffers.shape_of_shared_scores).transpose(0, 1)
            buffers.shared_part_of_scores.copy_(by_sequence)

    def _write_shares(self, buffers: _Buffers, variant: Variant) -> None:
        scores, softcap, sinks = buffers.scores, variant.softcap, variant.sinks
        if softcap is not None:
            scores.copy_(capped(scores, softcap))
        scores.add_(self._mask)
        if sinks is None:
            torch.softmax(buffers.scores_of_keys, -1, out=buffers.shares_of_keys)
            return
        sinks = sinks.float().view(scores.shape[1], -1)
        sinks = pad(sinks, (0, scores.shape[2] - sinks.shape[1]))[..., None]  # (Hkv, R, 1)
        buffers.shares_of_keys.copy_(softmax(buffers.scores_of_keys, sinks))

    def _write_products(self, buffers: _Buffers, values: Tensor) -> None:
        v = buffers.floats(self._own.of(values))
        if buffers.own_shares is not None:
            buffers.own_shares.copy_(buffers.own_part_of_shares)
        torch.bmm(buffers.rows_of_shares, v, out=buffers.own_products)
        if self._num_shared:
            buffers.own_part_of_products.copy_(buffers.own_products_by_block)
            v = self._shared.of(values).float()  # (S, Hkv, tokens, D)
            rows = buffers.shared_part_of_shares.flatten(2, 3).flatten(0, 1)  # (S * Hkv, B * R, ..)
            shared = torch.bmm(rows, v.flatten(0, 1)).view(buffers.shape_of_shared_products)
            buffers.shared_part_of_products.copy_(shared.permute(2, 0, 1, 3, 4))


class _Buffers:
    """The memory of a layer's computation, and views of it.

    B sequences of N blocks, of which the first S are shared; Hkv key heads, each with R query
    heads, of which G are real.
    """

    def __init__(
        self,
        workspace: Workspace,
        like: Tensor,
        num_sequences: int,
        num_blocks: int,
        num_shared: int,
        num_heads: int,
        heads_each: int,
        key_size: int,
        value_size: int,
    ) -> None:
        num_rows, num_own = round_up(heads_each, ROWS_MULTIPLE), num_blocks - num_shared
        b, n, s, h, r = num_sequences, num_blocks, num_shared, num_heads, num_rows
        self._workspace = workspace
        self._floats: dict[int, tuple[Tensor, Tensor]] = {}

        def take(name: str, *shape: int) -> Tensor:
            return workspace.take(name, like, *shape, dtype=torch.float32)

        self.all_queries = take("queries", b, h, r, key_size).zero_()
        self.queries = self.all_queries[:, :, :heads_each]
        self.scores = take("scores", b, h, r, n, BLOCK_TOKENS)
        self.scores_of_keys = self.scores.flatten(3)
        self.shares_of_keys = take("shares", b, h, r, n * BLOCK_TOKENS)
        shares = self.shares_of_keys.unflatten(3, (n, BLOCK_TOKENS))
        self.products = take("products", b, n, h, r, value_size)
        is_one_block = n == 1
        # With one block the order of a product is that of the whole: nothing is copied.
        self.own_queries = None if is_one_block else take("own queries", b, num_own, h, r, key_size)
        self.queries_by_block = self.all_queries[:, None].expand(-1, num_own, -1, -1, -1)
        own_queries = self.all_queries if self.own_queries is None else self.own_queries
        self.own_rows = own_queries.view(-1, r, key_size)
        by_block = (b, num_own, h, r, BLOCK_TOKENS)
        own_scores = self.scores if is_one_block else take("own scores", *by_block)
        self.own_scores = own_scores.view(-1, r, BLOCK_TOKENS)
        self.own_part_of_scores = None if is_one_block else self.scores[:, :, :, s:]
        self.own_scores_by_head = own_scores.view(by_block).permute(0, 2, 3, 1, 4)
        self.shared_part_of_scores = self.scores[:, :, :, :s]
        self.shape_of_shared_scores = (h, b, r, s, BLOCK_TOKENS)
        self.own_shares = None if is_one_block else take("own scores", *by_block)
        self.own_part_of_shares = shares[:, :, :, s:].permute(0, 3, 1, 2, 4)
        own_shares = shares if self.own_shares is None else self.own_shares
        self.rows_of_shares = own_shares.view(-1, r, BLOCK_TOKENS)
        self.shared_part_of_shares = shares[:, :, :, :s].permute(3, 1, 0, 2, 4)
        own_products = take("own products", b, num_own, h, r, value_size) if s else self.products
        self.own_products = own_products.view(-1, r, value_size)
        self.own_products_by_block = own_products
        self.own_part_of_products = self.products[:, s:]
        self.shared_part_of_products = self.products[:, :s]
        self.shape_of_shared_products = (s, h, b, r, value_size)
        self._sums = _sums(self.products)
        self._total = self.products[:, 0, :, :heads_each]

    def floats(self, blocks: Tensor) -> Tensor:
        """(n * Hkv, tokens, D) float32 of the own blocks' keys or values (n, Hkv, tokens, D)."""
        if blocks.dtype == torch.float32:
            return blocks.flatten(0, 1)
        size = blocks.shape[3]
        if size not in self._floats:
            room = self._workspace.take("own", blocks, *blocks.shape, dtype=torch.float32)
            self._floats[size] = (room, room.flatten(0, 1))
        room, rows = self._floats[size]
        room.copy_(blocks)
        return rows

    def sum_of_blocks(self) -> Tensor:
        """(B, Hkv, G, D), in ``arithmetic``'s order; overwrites the products."""
        for target, added in self._sums:
            target.add_(added)
        return self._total


def _sums(products: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The additions that make of products (B, N, ...) of N blocks their sum, in place of the first:
    target and what is added to it."""
    size = min(products.shape[1], GROUP_BLOCKS)
    groups = products.unflatten(1, (-1, size))  # (B, N / size, size, ...)
    firsts = groups[:, :, 0]
    within = [(firsts, groups[:, :, i]) for i in range(1, size)]
    return within + [(firsts[:, 0], firsts[:, i]) for i in range(1, firsts.shape[1])]


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
