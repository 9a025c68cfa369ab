"""The arithmetic of attention: one for every query row, in training, scoring and sampling.

A row's result has the same bits whether its token is trained on, scored, read in a prompt, sampled,
or read again after its keys were lost, whatever of its sequence is in a cache already, and whatever
shares the pass. All of it is float32:

1. scores: a product of the scaled query row with each key;
2. shares: a softmax over the scores of whole blocks of ``BLOCK_TOKENS`` keys, counted from the
   sequence's first, in which keys that the row does not see are minus infinity;
3. for each block, the product of its shares and its values;
4. the sum of these products in groups of ``GROUP_BLOCKS`` blocks, counted from the sequence's
   first, each group from left to right, and then over the groups from left to right.

Blocks without a visible key may be left out or added: they add exact zeros. Matrix products get
rows in multiples of ``ROWS_MULTIPLE`` and never more than one block of values, because only then
do the bits of a row not depend on the number of rows (measured with MKL, one thread and two).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from training.engine.torch.attention.variants import Reach, Variant

BLOCK_TOKENS = 32
"""Tokens of a block of keys, and of a cache."""

GROUP_BLOCKS = 8
"""Blocks whose products are added to each other first."""

ROWS_MULTIPLE = 4

PRODUCT_BLOCKS = 64
"""Most blocks of values whose products exist at one time: they should fit into a processor's
cache."""

TILE_TOKENS = 128
"""Most tokens of a sequence whose scores exist at one time."""

TILE_SCORES = 2**22
"""Most scores that exist at one time, unless ``FEWEST_TILE_TOKENS`` tokens of one sequence have
more: they should fit into a processor's cache."""

FEWEST_TILE_TOKENS = 16


def blocks_for(num_tokens: int) -> int:
    """The blocks that this many tokens of one sequence need."""
    return -(-num_tokens // BLOCK_TOKENS)


def tile_tokens(num_heads: int, num_keys: int) -> int:
    """The tokens of a sequence whose scores of so many keys exist at one time."""
    most = TILE_SCORES // (num_heads * num_keys) // FEWEST_TILE_TOKENS * FEWEST_TILE_TOKENS
    return min(TILE_TOKENS, max(FEWEST_TILE_TOKENS, most))


class Workspace:
    """Memory that one tile after another uses: writing new memory takes longer than a product.

    A tensor that was taken is overwritten when its name is taken again.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(
        self, name: str, like: Tensor, *shape: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A tensor of this shape, of any contents.

        Args:
            like: Of the same device, and of the same dtype unless another is given.
        """
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = like.new_empty(size, dtype=dtype or like.dtype)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)


def attend_rows(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    variant: Variant,
    *,
    heads_each: int,
    first_block: int,
    workspace: Workspace | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of n tokens of one or more sequences, for B key heads in all.

    Args:
        rows: (B, R, D) float32, scaled: of each query head that shares the key head its n tokens,
            one head after another, and then padding to a multiple of ``ROWS_MULTIPLE``.
        keys: (B, K, D) float32, of whole blocks; ``values`` likewise.
        mask: (n, m), added to the scores of the last m keys.
        heads_each: Query heads that share a key head.
        first_block: The number of the first block in its sequence.
        workspace: See ``shares_of``.

    Returns:
        (B, R, D), and the shares (B, R, K).
    """
    workspace = workspace or Workspace()
    shares = shares_of(rows, keys, mask, variant, heads_each=heads_each, workspace=workspace)
    return _weigh(shares, values, first_block, workspace), shares


def shares_of(
    rows: Tensor,
    keys: Tensor,
    mask: Tensor,
    variant: Variant,
    *,
    heads_each: int,
    workspace: Workspace,
) -> Tensor:
    """The shares (B, R, K) of ``attend_rows``, from its arguments; they are in the workspace, and
    valid until the next ones."""
    shape = (*rows.shape[:2], keys.shape[1])
    scores = torch.bmm(rows, keys.transpose(1, 2), out=workspace.take("scores", rows, *shape))
    if variant.softcap is not None:
        scores = capped(scores, variant.softcap)
    num_tokens, num_masked = mask.shape
    masked = scores[:, : heads_each * num_tokens, keys.shape[1] - num_masked :]
    masked.unflatten(1, (heads_each, num_tokens)).add_(mask)
    sinks = variant.sinks
    if sinks is not None:
        sinks = sinks.float().view(-1, heads_each).repeat_interleave(num_tokens, 1)
        sinks = pad(sinks, (0, rows.shape[1] - sinks.shape[1]))  # (Hkv, R)
        sinks = sinks.repeat(len(rows) // len(sinks), 1)[..., None]  # (B, R, 1)
    if sinks is None:
        return torch.softmax(scores, -1, out=workspace.take("shares", scores, *shape))
    return softmax(scores, sinks)


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The softmax over the last dimension; sinks (..., 1) are part of its sum, without a value."""
    if sinks is None:
        return scores.softmax(-1)
    # A whole block before the first, so that every key keeps its place among the lanes of a sum.
    before = scores.new_full((*scores.shape[:-1], BLOCK_TOKENS), -math.inf)
    before[..., :1] = sinks
    return torch.cat([before, scores], dim=-1).softmax(-1)[..., BLOCK_TOKENS:]


def capped(scores: Tensor, softcap: float) -> Tensor:
    """``softcap * tanh(score / softcap)``"""
    return (scores / softcap).tanh_().mul_(softcap)


def times_slope_of_cap(grad_scores: Tensor, scores: Tensor, softcap: float) -> None:
    """Turn the gradient of capped scores into that of the scores: times 1 - tanh^2."""
    slope = capped(scores, softcap)
    grad_scores.mul_(slope.div_(softcap).square_().neg_().add_(1))


def _weigh(shares: Tensor, values: Tensor, first_block: int, workspace: Workspace) -> Tensor:
    """(B, rows, D): the sum over blocks of shares (B, rows, K) times values (B, K, D)."""
    if len(shares) * GROUP_BLOCKS * BLOCK_TOKENS <= values.shape[1]:
        sums = [
            _weigh_many(*pair, first_block, workspace) for pair in zip(shares, values, strict=True)
        ]
        return sums[0][None] if len(sums) == 1 else torch.stack(sums)
    total: Tensor | None = None
    group: Tensor | None = None
    for start in range(0, values.shape[1], BLOCK_TOKENS):
        block = slice(start, start + BLOCK_TOKENS)
        product = torch.bmm(shares[..., block], values[:, block])
        if group is None:
            group = product
        else:
            group.add_(product)
        if (first_block + start // BLOCK_TOKENS + 1) % GROUP_BLOCKS == 0:
            total = group if total is None else total.add_(group)
            group = None
    if group is None:
        assert total is not None  # noqa: S101 - there is a key
        return total
    return group if total is None else total.add_(group)


def _weigh_many(shares: Tensor, values: Tensor, first_block: int, workspace: Workspace) -> Tensor:
    """(rows, D) of shares (rows, K) and values (K, D): many blocks share a batched product."""
    num_rows, num_keys = shares.shape
    num_blocks, size = num_keys // BLOCK_TOKENS, values.shape[1]
    by_block = shares.view(num_rows, num_blocks, BLOCK_TOKENS).transpose(0, 1)
    blocks = values.view(num_blocks, BLOCK_TOKENS, size)
    at_once = min(num_blocks, PRODUCT_BLOCKS)
    buffer = workspace.take("products", shares, at_once, num_rows, size)
    total: Tensor | None = None
    start = 0
    while start < num_blocks:
        before = (first_block + start) % GROUP_BLOCKS  # of the same group
        end = min(num_blocks, start + (GROUP_BLOCKS - before if before else PRODUCT_BLOCKS))
        if end - start > GROUP_BLOCKS:
            end -= (end - start) % GROUP_BLOCKS
        products = torch.bmm(by_block[start:end], blocks[start:end], out=buffer[: end - start])
        groups = products.unflatten(0, (-1, min(GROUP_BLOCKS, end - start)))
        sums = groups[:, 0]
        for number in range(1, groups.shape[1]):
            sums.add_(groups[:, number])
        for of_group in sums:
            total = of_group.clone() if total is None else total.add_(of_group)
        start = end
    assert total is not None  # noqa: S101 - there is a key
    return total


@lru_cache(maxsize=256)
def causal_mask(num_tokens: int, num_keys: int, device: torch.device) -> Tensor:
    """(n, m) float32: 0 where a token sees a key, else minus infinity; the first key is the first
    token's own."""
    return torch.full((num_tokens, num_keys), -math.inf, device=device).triu_(1)


@lru_cache(maxsize=32)
def reach_mask(
    reach: Reach,
    first_token: int,
    num_tokens: int,
    first_key: int,
    num_keys: int,
    device: torch.device,
) -> Tensor:
    """(n, m) float32: 0 where a token sees a key, else minus infinity. Positions count from a
    multiple of the reach's chunk."""
    tokens = torch.arange(first_token, first_token + num_tokens, device=device)
    keys = torch.arange(first_key, first_key + num_keys, device=device)
    mask = torch.zeros(num_tokens, num_keys, device=device)
    return mask.masked_fill_(~reach.sees(tokens, keys), -math.inf)
