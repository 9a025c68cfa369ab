"""Attention of short sequences and its derivative: many share batched products, and the shares are
kept for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from training.engine.torch.attention.arithmetic import BLOCK_TOKENS, attend_rows, times_slope_of_cap
from training.engine.torch.attention.tiles import Packed, Tile, tile_rows
from training.engine.torch.attention.variants import Variant
from training.engine.torch.thread_team import ThreadTeam, cut

PART_SCORES = 2**16
"""Fewest scores of a part that another thread computes."""

NARROW = 16
"""Matrix products with fewer columns than this take up to four times longer than transposed."""


def attend_short(
    packed: Packed,
    attended: Tensor,
    shares: Sequence[Tensor | None],
    tiles: Sequence[Tile],
    variant: Variant,
    team: ThreadTeam,
) -> None:
    """Write the output (B, heads, L, D) of all tiles, and the shares of those that keep them."""
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
            for part in _parts(packed, tiles, variant, team)
            for tile, each in zip(tiles, shares, strict=True)
        ]
    )


def short_gradients(
    packed: Packed,
    shares: Sequence[Tensor],
    grad_output: Tensor,
    tiles: Sequence[Tile],
    variant: Variant,
    team: ThreadTeam,
) -> Packed:
    """The gradients of ``packed``, from that of its output (B, heads, L, D)."""
    grads = packed.zeros()
    team.run(
        [
            partial(
                _add_gradients,
                packed.part(part),
                grads.part(part),
                grad_output[part],
                tiles,
                [each[part] for each in shares],
                variant,
            )
            for part in _parts(packed, tiles, variant, team)
        ]
    )
    return grads


def empty_shares(packed: Packed, tile: Tile) -> Tensor:
    """(B, heads * n, keys)"""
    num_rows = packed.queries.shape[1] * (tile.end - tile.start)
    return packed.keys.new_empty(len(packed.keys), num_rows, tile.end_key - tile.first_key)


def _parts(
    packed: Packed, tiles: Sequence[Tile], variant: Variant, team: ThreadTeam
) -> list[slice]:
    """The parts of a bucket's B ranges and key heads that the team computes."""
    count = len(packed.keys)
    tile = tiles[-1]
    num_scores = packed.queries.shape[1] * (tile.end - tile.start) * (tile.end_key - tile.first_key)
    if variant.sinks is not None or count * num_scores < PART_SCORES * 2:
        return [slice(0, count)]  # sinks are those of all key heads
    return cut(count, min(count, team.most_parts))


def _attend(
    packed: Packed, attended: Tensor, kept: Tensor | None, tile: Tile, variant: Variant
) -> None:
    keys = slice(tile.first_key, tile.end_key)
    rows, shares = attend_rows(
        tile_rows(packed.queries, tile),
        packed.keys[:, keys],
        packed.values[:, keys],
        tile.mask,
        variant,
        heads_each=packed.queries.shape[1],
        first_block=tile.first_key // BLOCK_TOKENS,
    )
    by_head = rows.unflatten(1, (-1, tile.end - tile.start))
    attended[:, :, tile.start : tile.end] = by_head
    if kept is not None:
        kept.copy_(shares)


def _add_gradients(
    packed: Packed,
    grads: Packed,
    grad_output: Tensor,
    tiles: Sequence[Tile],
    shares: Sequence[Tensor],
    variant: Variant,
) -> None:
    """Add to ``grads`` those of all tiles; the queries' is that of the scaled ones, and is
    written."""
    for tile, own in zip(tiles, shares, strict=True):
        span = slice(tile.first_key, tile.end_key)
        q, g = tile_rows(packed.queries, tile), tile_rows(grad_output, tile)
        k, v = packed.keys[:, span], packed.values[:, span]
        grad_shares = torch.bmm(g, v.transpose(1, 2))
        # The derivative of a softmax; a sink is part of its sum, but contributes no value.
        grad_scores = torch._softmax_backward_data(grad_shares, own, -1, own.dtype)
        if variant.softcap is not None:
            times_slope_of_cap(grad_scores, torch.bmm(q, k.transpose(1, 2)), variant.softcap)
        by_head = _product(grad_scores, k).unflatten(1, (-1, tile.end - tile.start))
        grads.queries[:, :, tile.start : tile.end] = by_head
        grads.keys[:, span].add_(_product(grad_scores.transpose(1, 2), q))
        grads.values[:, span].add_(_product(own.transpose(1, 2), g))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Batched left @ right."""
    if right.shape[2] >= NARROW:
        return torch.bmm(left, right)
    return torch.bmm(right.transpose(1, 2), left.transpose(1, 2)).transpose(1, 2)
