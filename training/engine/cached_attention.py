"""How queries find their keys while sampling: some in this pass, the others in the cache.

Two strategies behind ``packed.Attention``. A prefill pass reads one chunk of one prompt; a
decode pass reads one new token of many sequences. Neither lets what shares a pass touch the
arithmetic of a sequence: every kernel call below sees whole sequences of one job, and gives each
the same numbers whether it comes alone or with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from training.engine.kv_cache import KvCache, Region
from training.engine.packed import Attention


class PrefillAttention(Attention):
    """The next C tokens of one prompt, kept as the first sequence of its region."""

    def __init__(self, cache: KvCache, region: Region, start: int, num_tokens: int) -> None:
        """``start``: how many tokens of the prompt are in the cache already."""
        self._cache = cache
        self._region = region
        self._end = start + num_tokens
        device = cache.device
        first_row = region.row(0, start)
        self._rows = torch.arange(first_row, first_row + num_tokens, device=device)
        self._mask = None
        if start:  # without earlier keys the kernel's own causal mask is right, and faster
            shape = (num_tokens, self._end)
            self._mask = torch.ones(shape, dtype=torch.bool, device=device).tril(start)

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        self._cache.store(layer_idx, self._rows, key, value)
        keys, values = self._cache.view(layer_idx, self._region, 0, 1, self._end)
        output = scaled_dot_product_attention(
            query.transpose(0, 1)[None],  # (1, Hq, C, D)
            keys.transpose(1, 2),  # (1, Hkv, end, D)
            values.transpose(1, 2),
            attn_mask=self._mask,
            is_causal=self._mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output[0].transpose(0, 1)  # (C, Hq, D)


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
        self._runs = runs
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
        return output  # (T, Hq, D)


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
