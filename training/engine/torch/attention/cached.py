"""Attention while sampling: some keys are in this pass, the others in the cache.

There are two strategies behind ``packing.stream.Attention``. A prefill pass reads a chunk of each
of some prompts; a decode pass reads one new token of many sequences. Batch-mates do not affect the
arithmetic of a sequence: every kernel call sees whole sequences, of one job or, if they are short,
of many (``gathered_attention``), and gives each the same numbers alone and with others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from training.engine.sampler.kv_cache import KvCache, Region
from training.engine.torch.attention.gathered import (
    SHORT_CACHE_TOKENS,
    GatheredAttention,
    Newest,
    gather_by_length,
)
from training.engine.torch.attention.interface import Attention
from training.engine.torch.attention.variants import EVERYTHING, PLAIN, Reach, Variant


@dataclass(frozen=True, kw_only=True)
class PrefillChunk:
    """Adjacent rows of a prefill pass: the next tokens of one prompt."""

    first_row: int
    region: Region
    start: int
    """The number of the prompt's tokens that are in the cache already."""
    num_tokens: int
    sequence: int = 0
    """The region's sequence in which they are stored: the first, for a prompt."""

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class PrefillAttention(Attention):
    """A chunk of each of some prompts; rows outside the chunks are padding and get zeros."""

    def __init__(self, cache: KvCache, chunks: Sequence[PrefillChunk]) -> None:
        self._cache = cache
        self._chunks = chunks
        rows = [chunk.first_row + n for chunk in chunks for n in range(chunk.num_tokens)]
        cache_rows = [
            chunk.region.row(chunk.sequence, chunk.start + n)
            for chunk in chunks
            for n in range(chunk.num_tokens)
        ]
        self._rows = torch.tensor(rows, device=cache.device)
        self._cache_rows = torch.tensor(cache_rows, device=cache.device)
        self._views: dict[tuple[Reach, bool], list[_View]] = {}

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        variant: Variant = PLAIN,
    ) -> Tensor:
        self._cache.store(layer_idx, self._cache_rows, key[self._rows], value[self._rows])
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        for chunk, view in zip(self._chunks, self._views_of(variant), strict=True):
            rows = slice(chunk.first_row, chunk.first_row + chunk.num_tokens)
            keys, values = (
                x[:, view.first_key :]
                for x in self._cache.view(layer_idx, chunk.region, chunk.sequence, 1, chunk.end)
            )
            if not variant.has_plain_scores and view.mask is not None:
                output[rows] = attend_by_formula(
                    query[rows], keys[0], values[0], view.mask, scaling, variant
                )
                continue
            attended = scaled_dot_product_attention(
                query[rows].transpose(0, 1)[None],  # (1, Hq, C, D)
                keys.transpose(1, 2),  # (1, Hkv, keys, D)
                values.transpose(1, 2),
                attn_mask=view.mask,
                is_causal=view.mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            output[rows] = attended[0].transpose(0, 1)
        return output  # (T, Hq, D)

    def _views_of(self, variant: Variant) -> list[_View]:
        key = (variant.reach, variant.has_plain_scores)
        if key not in self._views:
            self._views[key] = [_view(c, variant, self._cache.device) for c in self._chunks]
        return self._views[key]


@dataclass(frozen=True, kw_only=True)
class _View:
    """The part of their sequence that a chunk's tokens see."""

    first_key: int
    """The first position that one of them sees."""
    mask: Tensor | None
    """(C, keys) bool, from there on; None if the kernel's own causal mask is right."""


def _view(chunk: PrefillChunk, variant: Variant, device: torch.device) -> _View:
    reach = EVERYTHING if variant.reach.covers(chunk.end) else variant.reach
    if reach is EVERYTHING and not chunk.start and variant.has_plain_scores:
        return _View(first_key=0, mask=None)
    first_key = reach.first_key(chunk.start)
    queries = torch.arange(chunk.start, chunk.end, device=device)
    keys = torch.arange(first_key, chunk.end, device=device)
    return _View(first_key=first_key, mask=reach.sees(queries, keys))


def attend_by_formula(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scaling: float,
    variant: Variant,
) -> Tensor:
    """Attention of Q tokens of one sequence, for scores that no fused kernel supports.

    Args:
        query: (Q, Hq, D).
        keys: (K, Hkv, D), and ``values`` likewise.
        mask: (Q, K) bool, the keys that each query sees.

    Returns:
        (Q, Hq, D), in the queries' dtype.
    """
    heads_each = query.shape[1] // keys.shape[1]
    added = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -math.inf)
    added = added.repeat(heads_each, 1)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for h in range(keys.shape[1]):
        heads = slice(h * heads_each, (h + 1) * heads_each)
        q = query[:, heads].transpose(0, 1).flatten(0, 1).float()  # (Hq / Hkv * Q, D)
        sinks = None
        if variant.sinks is not None:
            sinks = variant.sinks[heads].repeat_interleave(len(query))[:, None]
        scores = (q @ keys[:, h].float().T).mul_(scaling)
        shares = variant.shares(scores, added, sinks)
        attended = (shares @ values[:, h].float()).unflatten(0, (heads_each, -1))
        output[:, heads] = attended.transpose(0, 1).to(output.dtype)
    return output


@dataclass(frozen=True, kw_only=True)
class DecodeRun:
    """Adjacent rows of a decode pass: adjacent sequences of one job, equally long."""

    first_row: int
    region: Region
    first_sequence: int
    count: int
    length: int
    """Tokens of each sequence, the one that this pass reads included."""


class DecodeAttention(Attention):
    """One new token of each of many sequences; rows outside the runs are padding and get zeros."""

    def __init__(self, cache: KvCache, runs: Sequence[DecodeRun], num_rows: int) -> None:
        self._cache = cache
        self._runs = runs
        self._longest = max((run.length for run in runs), default=0)
        self._plans: dict[Reach, _DecodePlan] = {}
        rows = [run.first_row + n for run in runs for n in range(run.count)]
        cache_rows = [
            run.region.row(run.first_sequence + n, run.length - 1)
            for run in runs
            for n in range(run.count)
        ]
        self._cache_rows = torch.tensor(cache_rows, device=cache.device)
        self.real_rows = None if len(rows) == num_rows else torch.tensor(rows, device=cache.device)
        """The rows that are not padding, (n,) int64; None if all are real."""

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
        self._cache.store(layer_idx, self._cache_rows, key, value)
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        plan = self._plan(variant.reach)
        for run, first_key in plan.runs:
            rows = slice(run.first_row, run.first_row + run.count)
            keys, values = (
                x[:, first_key:]
                for x in self._cache.view(
                    layer_idx, run.region, run.first_sequence, run.count, run.length
                )
            )
            if variant.has_plain_scores:
                output[rows] = _attend_newest(query[rows], keys, values, scaling)
            else:
                output[rows] = _attend_newest_by_formula(
                    query[rows], keys, values, scaling, variant
                )
        for together in plan.gathered:
            together.attend(self._cache, layer_idx, query, scaling, variant, output)
        return output  # (T, Hq, D)

    def _plan(self, reach: Reach) -> _DecodePlan:
        if reach.covers(self._longest):
            reach = EVERYTHING
        if reach not in self._plans:
            short_tokens = SHORT_CACHE_TOKENS if self._cache.device.type == "cpu" else 0
            self._plans[reach] = _DecodePlan.of(self._runs, reach, short_tokens)
        return self._plans[reach]


@dataclass(frozen=True, kw_only=True, eq=False)
class _DecodePlan:
    """The computation of a pass's runs in layers of one reach."""

    runs: list[tuple[DecodeRun, int]]
    """Each run, and the first position that its newest tokens see."""
    gathered: list[GatheredAttention]

    @classmethod
    def of(cls, runs: Sequence[DecodeRun], reach: Reach, short_tokens: int) -> _DecodePlan:
        alone, short = [], []
        for run in runs:
            first_key = reach.first_key(run.length - 1)
            if run.length - first_key > short_tokens:
                alone.append((run, first_key))
            else:
                short += _newest(run, first_key)
        return cls(runs=alone, gathered=gather_by_length(short))


def _newest(run: DecodeRun, first_key: int) -> list[Newest]:
    return [
        Newest(
            row=run.first_row + n,
            first_cache_row=run.region.row(run.first_sequence + n, first_key),
            length=run.length - first_key,
        )
        for n in range(run.count)
    ]


def _attend_newest(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attention of the newest token of B sequences of equal length L.

    The query heads that share a key head are passed as if they were queries of
    one head: the newest token sees every key, so there is no mask that would differ between them,
    and no key is repeated.

    Args:
        query: (B, Hq, D).
        keys: (B, L, Hkv, D), and ``values`` likewise.

    Returns:
        (B, Hq, D).
    """
    num_key_heads = keys.shape[2]
    q = query.reshape(len(query), num_key_heads, -1, query.shape[2])  # (B, Hkv, Hq / Hkv, D)
    if q.device.type == "cpu" and q.dtype == torch.float32:
        return _attend_newest_float32(q * scaling, keys, values).flatten(1, 2)
    output = scaled_dot_product_attention(
        q, keys.transpose(1, 2), values.transpose(1, 2), scale=scaling
    )
    return output.flatten(1, 2)  # (B, Hq, D)


def _attend_newest_by_formula(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, variant: Variant
) -> Tensor:
    """The same in float32, if a cap or sinks change the scores: (B, Hq, D) float32."""
    num_key_heads = keys.shape[2]
    q = query.float().reshape(len(query), num_key_heads, -1, query.shape[2])
    sinks = None if variant.sinks is None else variant.sinks.view(num_key_heads, -1, 1)
    heads = []
    for h in range(num_key_heads):
        scores = torch.bmm(q[:, h], keys[:, :, h].float().transpose(1, 2)).mul_(scaling)
        shares = variant.shares(scores, None, None if sinks is None else sinks[h])
        heads.append(torch.bmm(shares, values[:, :, h].float()))  # (B, Hq / Hkv, D)
    return torch.stack(heads, dim=1).flatten(1, 2)


def _attend_newest_float32(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same with two products per key head.

    The last bits of the fused CPU kernel's float32 results depend on the thread that computes a
    sequence, and so on its batch-mates; those of batched products do not (measured with MKL).
    """
    heads = []
    for h in range(keys.shape[2]):
        scores = torch.bmm(q[:, h], keys[:, :, h].transpose(1, 2))  # (B, Hq / Hkv, L)
        heads.append(torch.bmm(scores.softmax(-1), values[:, :, h]))  # (B, Hq / Hkv, D)
    return torch.stack(heads, dim=1)  # (B, Hkv, Hq / Hkv, D)
