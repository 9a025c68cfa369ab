"""How queries find their keys while sampling: some in this pass, the others in the cache.

Two strategies behind ``packed.Attention``. A prefill pass reads a chunk of each of some prompts; a
decode pass reads one new token of many sequences. Neither lets what shares a pass touch the
arithmetic of a sequence: every kernel call sees whole sequences, of one job or, where they are
short, of many (``gathered_attention``), and gives each the same numbers whether it comes alone or
with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from training.engine.sampler.kv_cache import KvCache, Region
from training.engine.torch.attention.gathered import SHORT_TOKENS, Newest, gather_by_length
from training.engine.torch.packing.stream import Attention


@dataclass(frozen=True, kw_only=True)
class PrefillChunk:
    """Neighbouring rows of a prefill pass: the next tokens of one prompt."""

    first_row: int
    region: Region
    """The prompt is kept as its first sequence."""
    start: int
    """How many tokens of the prompt are in the cache already."""
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class PrefillAttention(Attention):
    """A chunk of each of some prompts; rows of no chunk are padding and get zeros."""

    def __init__(self, cache: KvCache, chunks: Sequence[PrefillChunk]) -> None:
        self._cache = cache
        self._chunks = chunks
        rows = [chunk.first_row + n for chunk in chunks for n in range(chunk.num_tokens)]
        cache_rows = [
            chunk.region.row(0, chunk.start + n)
            for chunk in chunks
            for n in range(chunk.num_tokens)
        ]
        self._rows = torch.tensor(rows, device=cache.device)
        self._cache_rows = torch.tensor(cache_rows, device=cache.device)
        self._masks = [_late_causal_mask(chunk, cache.device) for chunk in chunks]

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        self._cache.store(layer_idx, self._cache_rows, key[self._rows], value[self._rows])
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        for chunk, mask in zip(self._chunks, self._masks, strict=True):
            rows = slice(chunk.first_row, chunk.first_row + chunk.num_tokens)
            keys, values = self._cache.view(layer_idx, chunk.region, 0, 1, chunk.end)
            attended = scaled_dot_product_attention(
                query[rows].transpose(0, 1)[None],  # (1, Hq, C, D)
                keys.transpose(1, 2),  # (1, Hkv, end, D)
                values.transpose(1, 2),
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            output[rows] = attended[0].transpose(0, 1)
        return output  # (T, Hq, D)


def _late_causal_mask(chunk: PrefillChunk, device: torch.device) -> Tensor | None:
    """(C, end) bool; None at a prompt's start, where the kernel's own causal mask is right."""
    if not chunk.start:
        return None
    shape = (chunk.num_tokens, chunk.end)
    return torch.ones(shape, dtype=torch.bool, device=device).tril(chunk.start)


@dataclass(frozen=True, kw_only=True)
class DecodeRun:
    """Neighbouring rows of a decode pass: neighbouring sequences of one job, equally long."""

    first_row: int
    region: Region
    first_sequence: int
    count: int
    length: int
    """Tokens of each sequence, the one that this pass reads included."""


class DecodeAttention(Attention):
    """One new token of each of many sequences; rows of no run are padding and get zeros."""

    def __init__(self, cache: KvCache, runs: Sequence[DecodeRun], num_rows: int) -> None:
        self._cache = cache
        short_tokens = SHORT_TOKENS if cache.device.type == "cpu" else 0
        self._runs = [run for run in runs if run.length > short_tokens]
        self._gathered = gather_by_length(
            [each for run in runs if run.length <= short_tokens for each in _newest(run)]
        )
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
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        if self.real_rows is not None:
            key, value = key[self.real_rows], value[self.real_rows]
        self._cache.store(layer_idx, self._cache_rows, key, value)
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        for run in self._runs:
            rows = slice(run.first_row, run.first_row + run.count)
            keys, values = self._cache.view(
                layer_idx, run.region, run.first_sequence, run.count, run.length
            )
            output[rows] = _attend_newest(query[rows], keys, values, scaling)
        for together in self._gathered:
            together.attend(self._cache, layer_idx, query, scaling, output)
        return output  # (T, Hq, D)


def _newest(run: DecodeRun) -> list[Newest]:
    return [
        Newest(
            row=run.first_row + n,
            first_cache_row=run.region.row(run.first_sequence + n, 0),
            length=run.length,
        )
        for n in range(run.count)
    ]


def _attend_newest(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attention of the newest token of B sequences of equal length L.

    The query heads that share a key head are handed over as if they were that many queries of
    one head: the newest token sees every key, so there is no mask that would tell them apart,
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


def _attend_newest_float32(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same by two products per key head.

    The fused CPU kernel gives a float32 sequence other last bits depending on which thread takes
    it, so on what is beside it in the batch; batched products do not (measured with MKL).
    """
    heads = []
    for h in range(keys.shape[2]):
        scores = torch.bmm(q[:, h], keys[:, :, h].transpose(1, 2))  # (B, Hq / Hkv, L)
        heads.append(torch.bmm(scores.softmax(-1), values[:, :, h]))  # (B, Hq / Hkv, D)
    return torch.stack(heads, dim=1)  # (B, Hkv, Hq / Hkv, D)
