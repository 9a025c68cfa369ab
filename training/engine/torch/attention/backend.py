"""Attention inside each sequence of a packed stream, and the way transformers calls it.

``packed_attention`` is registered under the name ``packed``; a model loaded with
``attn_implementation="packed"`` gets no mask from transformers and hands its rotated queries,
keys and values to the ``Attention`` of the current ``PackedContext``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from training.engine.torch.attention.short import (
    SHORT_TOKENS,
    Bucket,
    make_buckets,
    short_attention,
)
from training.engine.torch.packing.ranges import RowRange, stream_rows, take_rows
from training.engine.torch.packing.stream import Attention, PackedContext

ATTENTION_NAME = "packed"

REFUSED_ARGUMENTS = ("softcap", "s_aux", "sinks", "position_bias", "head_mask")
"""Attention variants whose arguments we would have to honour and do not."""


class UnsupportedAttention(Exception):
    """The base model's attention needs something that the packed attention does not do."""


class SequenceAttention(Attention):
    """Causal attention of whole sequences: nothing cached, every key is in the stream."""

    def __init__(self, row_ranges: Sequence[RowRange]) -> None:
        """``row_ranges``: what the stream consists of, in order."""
        self._row_ranges = row_ranges
        self._plan: AttentionPlan | None = None

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        if self._plan is None:
            on_cpu = query.device.type == "cpu"
            self._plan = AttentionPlan.of(self._row_ranges, query.device, on_cpu=on_cpu)
        plan = self._plan
        if not plan.runs:
            return short_attention(query, key, value, plan.buckets, scaling)
        long = _long_attention(query, key, value, plan, scaling)
        if plan.rows is None:
            return long
        if plan.buckets:
            output = short_attention(query, key, value, plan.buckets, scaling)
        else:
            output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        return output.index_copy(0, plan.rows, long)  # (T, Hq, D)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Neighbouring ranges that attention takes in one call: of one length, after equally many
    tokens."""

    count: int
    length: int
    num_before: int
    mask: Tensor | None
    """(length, keys) bool, what a token sees; None where the kernel's own causal mask is right."""

    @property
    def num_rows(self) -> int:
        return self.count * self.length

    @property
    def num_keys(self) -> int:
        return self.count * (self.num_before + self.length)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionPlan:
    """How one stream's ranges share calls, the same in every layer.

    On a CPU short sequences are taken together and the others one by one (its fused float32 kernel
    gives some shapes other last bits in a batch); on a GPU neighbours of equal length share a
    call.
    """

    buckets: Sequence[Bucket]
    runs: Sequence[_Run]
    rows: Tensor | None
    """(n,) int64, the rows of the runs; None if they are the whole stream, in order, or none."""
    key_rows: Tensor | None
    """(m,) int64, the rows that the runs see, run by run; None if that is the same."""

    @classmethod
    def of(
        cls, row_ranges: Sequence[RowRange], device: torch.device, *, on_cpu: bool
    ) -> AttentionPlan:
        short_tokens = SHORT_TOKENS if on_cpu else 0
        short = [row_range for row_range in row_ranges if row_range.num_keys <= short_tokens]
        long = [row_range for row_range in row_ranges if row_range.num_keys > short_tokens]

        def batch_mates(numbered: tuple[int, RowRange]) -> tuple[int, ...]:
            index, row_range = numbered
            return (index,) if on_cpu else (row_range.length, row_range.num_before)

        runs = []
        for _, run in groupby(enumerate(long), batch_mates):
            alike = [row_range for _, row_range in run]
            runs.append(_make_run(alike[0], len(alike), device))
        rows = key_rows = None
        if long and (short or any(row_range.before for row_range in long)):
            rows = stream_rows(long).to(device)
            key_rows = stream_rows(each for row_range in long for each in row_range.seen).to(device)
        return cls(buckets=make_buckets(short), runs=runs, rows=rows, key_rows=key_rows)


def _make_run(row_range: RowRange, count: int, device: torch.device) -> _Run:
    mask = None
    if row_range.before:
        shape = (row_range.length, row_range.num_keys)
        mask = torch.ones(shape, dtype=torch.bool, device=device).tril(row_range.num_before)
    return _Run(count=count, length=row_range.length, num_before=row_range.num_before, mask=mask)


def _long_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scaling: float
) -> Tensor:
    """(n, Hq, D), the rows of the runs, one run after another."""
    if plan.rows is not None and plan.key_rows is not None:
        query = take_rows(query, plan.rows)
        key, value = (take_rows(x, plan.key_rows) for x in (key, value))
    # split, not slicing: its backward is one concatenation however many runs there are.
    queries = query.split([run.num_rows for run in plan.runs])
    keys, values = (x.split([run.num_keys for run in plan.runs]) for x in (key, value))
    return torch.cat(
        [
            _attend(q, k, v, run, scaling)
            for q, k, v, run in zip(queries, keys, values, plan.runs, strict=True)
        ]
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, run: _Run, scaling: float) -> Tensor:
    """One run: (rows, H, D) in and out."""
    q, k, v = (
        rows.unflatten(0, (run.count, -1)).transpose(1, 2)  # (count, H, length, D)
        for rows in (query, key, value)
    )
    output = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=run.mask,
        is_causal=run.mask is None,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output.transpose(1, 2).flatten(0, 1)  # (rows, Hq, D)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_context: PackedContext,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """What transformers calls in each attention layer.

    Args:
        query: (1, Hq, T, D).
        key: (1, Hkv, T, D).
        value: Likewise.

    Returns:
        (1, T, Hq, D), and no attention weights.
    """
    for name in REFUSED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(f"The base model's attention uses {name}.")
    output = packed_context.attention.attend(
        _layer_idx(module),
        query[0].transpose(0, 1),  # (T, Hq, D)
        key[0].transpose(0, 1),  # (T, Hkv, D)
        value[0].transpose(0, 1),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return output[None], None  # (1, T, Hq, D)


def _layer_idx(module: nn.Module) -> int:
    layer_idx = module.layer_idx
    if not isinstance(layer_idx, int):
        raise UnsupportedAttention("The base model does not number its attention layers.")
    return layer_idx


AttentionInterface.register(ATTENTION_NAME, packed_attention)
