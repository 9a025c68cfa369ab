"""Attention of long sequences and its derivative, in parts that use little memory.

A part is one key head of one sequence and some of its tiles. Parts have the same bounds whatever
computes them, and the gradients of those that share keys are added in order, so no bit depends on
batch-mates or on the number of threads. A part's tiles use the same memory one after another.

Backwards the shares are computed again, as forwards. With O the output and g its gradient,

    d loss / d score(i, j) = share(i, j) * (g(i) . v(j) - g(i) . O(i))

also with sinks, which are part of a row's sum but have no value. These gradients and the shares
then go to the products in the model's dtype, whose sums over tiles are float32. (FlashAttention 2
does the same: Dao, arXiv 2307.08691, algorithm 2.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from training.engine.torch.attention.arithmetic import (
    BLOCK_TOKENS,
    Workspace,
    attend_rows,
    shares_of,
    times_slope_of_cap,
)
from training.engine.torch.attention.tiles import Packed, Tile, tile_rows
from training.engine.torch.attention.variants import Variant
from training.engine.torch.lora_linear import add_product
from training.engine.torch.thread_team import ThreadTeam

CHUNKS = 2
"""Parts of each key head of a sequence of at least ``CHUNKED_TILES`` tiles."""

CHUNKED_TILES = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """Some tiles of one of B sequences and key heads."""

    index: int
    """Of the B."""
    tiles: Sequence[Tile]

    @property
    def keys(self) -> slice:
        """All that its tiles see."""
        return slice(self.tiles[0].first_key, self.tiles[-1].end_key)

    def variant(self, whole: Variant, heads_each: int) -> Variant:
        """With the sinks of this key head's query heads."""
        if whole.sinks is None:
            return whole
        by_key_head = whole.sinks.view(-1, heads_each)
        return replace(whole, sinks=by_key_head[self.index % len(by_key_head)])


def _parts(count: int, tiles: Sequence[Tile]) -> list[_Part]:
    chunks = list(_chunks(tiles))
    return [_Part(index=index, tiles=chunk) for index in range(count) for chunk in chunks]


def _chunks(tiles: Sequence[Tile]) -> Iterator[Sequence[Tile]]:
    """Adjacent tiles, with about equally many scores in each chunk."""
    if len(tiles) < CHUNKED_TILES:
        yield tiles
        return
    sizes = [(tile.end - tile.start) * (tile.end_key - tile.first_key) for tile in tiles]
    start = num_scores = 0
    for end, size in enumerate(sizes, 1):
        num_scores += size
        if num_scores * CHUNKS >= sum(sizes) or end == len(tiles):
            yield tiles[start:end]
            start, num_scores = end, 0


def attend_long(
    packed: Packed, attended: Tensor, tiles: Sequence[Tile], variant: Variant, team: ThreadTeam
) -> None:
    """Write the output (B, heads, L, D) of all tiles."""
    tasks = [
        partial(_attend, packed, attended, part, variant) for part in _parts(len(attended), tiles)
    ]
    team.run(tasks)


def _attend(packed: Packed, attended: Tensor, part: _Part, variant: Variant) -> None:
    own = packed.part(slice(part.index, part.index + 1))
    heads_each = own.queries.shape[1]
    own_variant, workspace = part.variant(variant, heads_each), Workspace()
    for tile in part.tiles:
        span = slice(tile.first_key, tile.end_key)
        rows, _ = attend_rows(
            tile_rows(own.queries, tile),
            own.keys[:, span],
            own.values[:, span],
            tile.mask,
            own_variant,
            heads_each=heads_each,
            first_block=tile.first_key // BLOCK_TOKENS,
            workspace=workspace,
        )
        by_head = rows[0].unflatten(0, (heads_each, -1))
        attended[part.index, :, tile.start : tile.end] = by_head


def long_gradients(
    packed: Packed,
    output: Tensor,
    grad_output: Tensor,
    tiles: Sequence[Tile],
    variant: Variant,
    dtype: torch.dtype,
    team: ThreadTeam,
) -> Packed:
    """The gradients of ``packed``, from those of its output.

    Args:
        output: (B, heads, L, D) float32, what ``attend_long`` wrote; ``grad_output`` likewise.
        dtype: The model's.
    """
    grads = packed.zeros()
    grad_sums = (output * grad_output).sum(-1, keepdim=True)  # (B, heads, L, 1)
    parts = _parts(len(output), tiles)
    found = team.run(
        [
            partial(_gradients, packed, grad_output, grad_sums, grads.queries, part, variant, dtype)
            for part in parts
        ]
    )
    for part, (grad_keys, grad_values) in zip(parts, found, strict=True):
        grads.keys[part.index, part.keys].add_(grad_keys)
        grads.values[part.index, part.keys].add_(grad_values)
    return grads


def _gradients(
    packed: Packed,
    grad_output: Tensor,
    grad_sums: Tensor,
    grad_queries: Tensor,
    part: _Part,
    variant: Variant,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The gradients of a part's keys and values, (k, D) each; those of its queries are written."""
    own = packed.part(slice(part.index, part.index + 1))
    heads_each = own.queries.shape[1]
    own_variant, workspace = part.variant(variant, heads_each), Workspace()
    keys, values = own.keys[0, part.keys], own.values[0, part.keys]
    narrow_keys = keys.to(dtype)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    for tile in part.tiles:
        span = slice(tile.first_key - part.keys.start, tile.end_key - part.keys.start)
        q, g, of_rows = (
            tile_rows(x[part.index][None], tile)[0]
            for x in (packed.queries, grad_output, grad_sums)
        )
        k, v = keys[span], values[span]
        shares = shares_of(
            q[None], k[None], tile.mask, own_variant, heads_each=heads_each, workspace=workspace
        )[0]
        grad_scores = torch.mm(g, v.T, out=workspace.take("gradients", shares, *shares.shape))
        grad_scores.sub_(of_rows).mul_(shares)
        if variant.softcap is not None:
            times_slope_of_cap(grad_scores, q @ k.T, variant.softcap)
        narrow = _narrow(shares, dtype, workspace)
        add_product(grad_values[span], narrow.T, g.to(dtype))
        narrow = _narrow(grad_scores, dtype, workspace)
        add_product(grad_keys[span], narrow.T, q.to(dtype))
        by_head = (narrow @ narrow_keys[span]).unflatten(0, (heads_each, -1))
        grad_queries[part.index, :, tile.start : tile.end] = by_head
    return grad_keys, grad_values


def _narrow(x: Tensor, dtype: torch.dtype, workspace: Workspace) -> Tensor:
    """x in the model's dtype; in the workspace, if that is another."""
    if x.dtype == dtype:
        return x
    return workspace.take("narrow", x, *x.shape, dtype=dtype).copy_(x)
