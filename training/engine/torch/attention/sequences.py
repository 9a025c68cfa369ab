"""Causal attention of whole sequences of a packed stream: which calls compute them, and the calls.

Nothing is cached: every key is in the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from training.engine.torch.attention.blocks import (
    BlockGroup,
    block_attention,
    make_block_groups,
)
from training.engine.torch.attention.interface import Attention
from training.engine.torch.attention.short import (
    SHORT_TOKENS,
    Bucket,
    make_buckets,
    short_attention,
)
from training.engine.torch.attention.variants import EVERYTHING, PLAIN, Reach, Variant
from training.engine.torch.packing.ranges import RowRange, stream_rows, take_rows


class SequenceAttention(Attention):
    """Causal attention of whole sequences: nothing cached, every key is in the stream."""

    def __init__(self, row_ranges: Sequence[RowRange], *, on_cpu: bool | None = None) -> None:
        """
        Args:
            row_ranges: The parts of the stream, in order.
            on_cpu: Whether to group calls as is best on a CPU; None decides by the tensors' device.
        """
        self._on_cpu = on_cpu
        self._row_ranges = row_ranges
        self._longest = max(row_range.num_keys for row_range in row_ranges)
        self._plans: dict[tuple[Reach, bool], _Plan] = {}

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        variant: Variant = PLAIN,
    ) -> Tensor:
        plan = self._plan(variant, query.device)
        if plan.plain is None:
            return block_attention(query, key, value, plan.blocks, variant, scaling)
        plain = plain_attention(query, key, value, plan.plain, scaling)
        if plan.in_blocks is None:
            return plain
        blocks = block_attention(query, key, value, plan.blocks, variant, scaling)
        return torch.where(plan.in_blocks, blocks, plain)  # (T, Hq, D)

    def _plan(self, variant: Variant, device: torch.device) -> _Plan:
        reach = EVERYTHING if variant.reach.covers(self._longest) else variant.reach
        key = (reach, variant.has_plain_scores)
        if key not in self._plans:
            on_cpu = device.type == "cpu" if self._on_cpu is None else self._on_cpu
            self._plans[key] = _Plan.of(self._row_ranges, variant, reach, device, on_cpu=on_cpu)
        return self._plans[key]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """The computation of one stream's ranges in the layers of one variant."""

    plain: AttentionPlan | None
    """For sequences that see all earlier tokens, as in a layer without a window; None if there are
    none."""
    blocks: Sequence[BlockGroup]
    """For the other sequences."""
    in_blocks: Tensor | None
    """(T, 1, 1) bool, the rows of the others; None if there are none."""

    @classmethod
    def of(
        cls,
        row_ranges: Sequence[RowRange],
        variant: Variant,
        reach: Reach,
        device: torch.device,
        *,
        on_cpu: bool,
    ) -> _Plan:
        def is_plain(row_range: RowRange) -> bool:
            return variant.has_plain_scores and reach.covers(row_range.num_keys)

        plain = [row_range for row_range in row_ranges if is_plain(row_range)]
        others = [row_range for row_range in row_ranges if not is_plain(row_range)]
        if not others:
            whole = AttentionPlan.of(row_ranges, device, on_cpu=on_cpu)
            return cls(plain=whole, blocks=(), in_blocks=None)
        groups = make_block_groups(others, reach, device)
        if not plain:
            return cls(plain=None, blocks=groups, in_blocks=None)
        in_blocks = torch.zeros(row_ranges[-1].end, 1, 1, dtype=torch.bool, device=device)
        in_blocks[stream_rows(others).to(device)] = True
        some = AttentionPlan.of(plain, device, on_cpu=on_cpu, is_whole_stream=False)
        return cls(plain=some, blocks=groups, in_blocks=in_blocks)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scaling: float
) -> Tensor:
    """Attention of the rows of a plan; zero for others. (T, Hq, D)"""
    if not plan.runs:
        return short_attention(query, key, value, plan.buckets, scaling)
    long = _long_attention(query, key, value, plan, scaling)
    if plan.rows is None:
        return long
    if plan.buckets:
        output = short_attention(query, key, value, plan.buckets, scaling)
    else:
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    return output.index_copy(0, plan.rows, long)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Adjacent ranges that one attention call computes: of equal length, after equally many
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
    """The grouping of one stream's ranges into calls, the same in every layer.

    On a CPU short sequences are computed together and the others one by one (its fused float32
    kernel changes the last bits of some shapes in a batch); on a GPU neighbours of equal length
    share a call.
    """

    buckets: Sequence[Bucket]
    runs: Sequence[_Run]
    rows: Tensor | None
    """(n,) int64, the rows of the runs; None if they are the whole stream, in order, or none."""
    key_rows: Tensor | None
    """(m,) int64, the rows that the runs see, run by run; None if they equal ``rows``."""

    @classmethod
    def of(
        cls,
        row_ranges: Sequence[RowRange],
        device: torch.device,
        *,
        on_cpu: bool,
        is_whole_stream: bool = True,
    ) -> AttentionPlan:
        """``is_whole_stream``: whether the ranges are all rows of the stream, in order."""
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
        shares_rows = any(row_range.before for row_range in long)
        if long and (short or shares_rows or not is_whole_stream):
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
    # split, not slicing: its backward is one concatenation for any number of runs.
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
