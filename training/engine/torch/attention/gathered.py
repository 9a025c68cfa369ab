"""Attention of the newest tokens of many short sequences at once, on a CPU.

A call per sequence and layer is most of the cost of a short sequence's token. So the keys and
values of short sequences are copied out of the cache, padded to a multiple of ``BUCKET_TOKENS``,
and all sequences of one padded length share two batched products. A sequence's padded length
depends only on its own length, and its numbers are the same alone and with batch-mates (measured
with MKL, one thread and two). The arithmetic is float32. A sequence is padded with its own first
token, which is masked, so a neighbour's values cannot reach it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.engine.sampler.kv_cache import KvCache
from training.engine.torch.attention.variants import Variant
from training.engine.torch.packing.stream import round_up

SHORT_CACHE_TOKENS = 256
"""Longer sequences take longer to copy than a separate call takes."""

BUCKET_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Newest:
    """The newest token of one sequence."""

    row: int
    """Row of the stream."""
    first_cache_row: int
    """The cache row of the first token that it sees; the others follow."""
    length: int
    """Tokens that it sees, itself included."""


class GatheredAttention:
    """B sequences of one padded length L."""

    def __init__(self, sequences: Sequence[Newest]) -> None:
        length = round_up(sequences[0].length, BUCKET_TOKENS)
        lengths = torch.tensor([each.length for each in sequences])[:, None]  # (B, 1)
        first = torch.tensor([each.first_cache_row for each in sequences])[:, None]
        places = torch.arange(length)
        is_padding = places >= lengths  # (B, L)
        self._rows = torch.tensor([each.row for each in sequences])
        self._cache_rows = (first + places).where(~is_padding, first)  # (B, L)
        self._mask = torch.zeros(is_padding.shape).masked_fill_(is_padding, -math.inf)
        self._by_heads: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self,
        cache: KvCache,
        layer_idx: int,
        query: Tensor,
        scaling: float,
        variant: Variant,
        output: Tensor,
    ) -> None:
        """Write these sequences' rows of ``output`` (T, Hq, D), like ``query``'s."""
        num_key_heads = cache.num_heads(layer_idx)  # differs between layers in some models
        if num_key_heads not in self._by_heads:
            self._by_heads[num_key_heads] = self._spread(num_key_heads)
        places, mask = self._by_heads[num_key_heads]
        keys, values = (  # (B * Hkv, L, D)
            x.float().view(len(mask), mask.shape[2], -1) for x in cache.gather(layer_idx, places)
        )
        q = query.index_select(0, self._rows).float()  # (B, Hq, D)
        q = q.view(len(mask), -1, q.shape[2])  # (B * Hkv, Hq / Hkv, D)
        if variant.has_plain_scores:
            shares = torch.baddbmm(mask, q, keys.transpose(1, 2), alpha=scaling).softmax(-1)
        else:
            sinks = variant.sinks
            if sinks is not None:
                sinks = sinks.view(num_key_heads, -1, 1).repeat(len(self._rows), 1, 1)
            scores = torch.bmm(q, keys.transpose(1, 2)).mul_(scaling)
            shares = variant.shares(scores, mask, sinks)
        attended = torch.bmm(shares, values)  # (B * Hkv, Hq / Hkv, D)
        attended = attended.view(-1, *output.shape[1:]).to(output.dtype)  # (B, Hq, D)
        output.index_copy_(0, self._rows, attended)

    def _spread(self, num_key_heads: int) -> tuple[Tensor, Tensor]:
        """Places (B * Hkv * L,) in a cache seen as rows of single heads, mask (B * Hkv, 1, L)."""
        heads = torch.arange(num_key_heads)[:, None]
        places = self._cache_rows[:, None] * num_key_heads + heads  # (B, Hkv, L)
        mask = self._mask[:, None].repeat_interleave(num_key_heads, 0)
        return places.flatten(), mask


def gather_by_length(sequences: Sequence[Newest]) -> list[GatheredAttention]:
    """Group sequences by padded length."""
    members: dict[int, list[Newest]] = {}
    for each in sequences:
        members.setdefault(round_up(each.length, BUCKET_TOKENS), []).append(each)
    return [GatheredAttention(same) for same in members.values()]
