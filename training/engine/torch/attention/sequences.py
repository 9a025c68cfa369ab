"""Causal attention of whole sequences of a packed stream: which calls compute them.

Nothing is cached: every key is in the stream. ``blocks`` computes all layers on a CPU, with the
sampler's arithmetic; on a GPU torch's fused kernel computes sequences with plain scores that see
all earlier tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from training.engine.torch.attention.blocks import KEPT_KEYS, block_attention, is_long
from training.engine.torch.attention.interface import Attention
from training.engine.torch.attention.tiles import Bucket, make_buckets
from training.engine.torch.attention.variants import EVERYTHING, PLAIN, Reach, Variant
from training.engine.torch.packing.ranges import RowRange, stream_rows, take_rows
from training.engine.torch.thread_team import ThreadTeam
from training.engine.torch.to_device import to_device


class SequenceAttention(Attention):
    """Causal attention of whole sequences: nothing cached, every key is in the stream."""

    def __init__(
        self,
        row_ranges: Sequence[RowRange],
        *,
        fuses: bool | None = None,
        kept_keys: int = KEPT_KEYS,
        team: ThreadTeam | None = None,
        keeps_outputs: bool = False,
    ) -> None:
        """
        Args:
            row_ranges: The parts of the stream, in order.
            fuses: Whether torch's fused kernel computes plain attention; None decides by the
                tensors' device.
            kept_keys: See ``blocks.KEPT_KEYS``.
            team: Computes parts of ``blocks``; None does it in this thread.
            keeps_outputs: Whether layers are called a second time, in the backward pass
                (``recompute``): the outputs of ``blocks`` are then kept for that, if all its
                sequences are long. They are a small part of what such a layer does not keep, and
                attention is most of the time of a long sequence.
        """
        self._keeps_outputs = keeps_outputs
        self._outputs: dict[int, Tensor] = {}
        """Layer to what ``blocks`` computed, until it is used the second time."""
        self._team = team
        self._fuses = fuses
        self._kept_keys = kept_keys
        self._row_ranges = row_ranges
        self._longest = max(row_range.num_keys for row_range in row_ranges)
        self._plans: dict[tuple[Reach, bool, int], _Plan] = {}

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        variant: Variant = PLAIN,
    ) -> Tensor:
        plan = self._plan(variant, query.shape[1], query.device)
        blocks = fused = None
        if plan.buckets:
            known = self._outputs.pop(layer_idx, None)
            blocks = block_attention(
                query,
                key,
                value,
                plan.buckets,
                variant,
                scaling,
                kept_keys=self._kept_keys,
                team=self._team,
                known=known,
            )
            if known is None and self._keeps(plan.buckets):
                self._outputs[layer_idx] = blocks.detach()
        if plan.fused is not None:
            fused = _fused_attention(query, key, value, plan.fused, scaling)
        if blocks is None or fused is None:
            output = fused if blocks is None else blocks
            assert output is not None  # noqa: S101 - each range is in one of the two
            return output
        return torch.where(plan.in_buckets, blocks, fused)  # (T, Hq, D)

    def _keeps(self, buckets: Sequence[Bucket]) -> bool:
        return self._keeps_outputs and all(is_long(each, self._kept_keys) for each in buckets)

    def _plan(self, variant: Variant, num_heads: int, device: torch.device) -> _Plan:
        reach = EVERYTHING if variant.reach.covers(self._longest) else variant.reach
        fuses = device.type != "cpu" if self._fuses is None else self._fuses
        key = (reach, fuses and variant.has_plain_scores, num_heads)
        if key not in self._plans:
            self._plans[key] = _Plan.of(self._row_ranges, *key, device)
        return self._plans[key]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """The computation of one stream's ranges in the layers of one variant."""

    fused: FusedPlan | None
    """Of ranges that the fused kernel computes; None if there are none."""
    buckets: Sequence[Bucket]
    """Of the others."""
    in_buckets: Tensor
    """(T, 1, 1) bool, the rows of the others."""

    @classmethod
    def of(
        cls,
        row_ranges: Sequence[RowRange],
        reach: Reach,
        fuses: bool,
        num_heads: int,
        device: torch.device,
    ) -> _Plan:
        fused = [r for r in row_ranges if fuses and reach.covers(r.num_keys)]
        others = [r for r in row_ranges if not (fuses and reach.covers(r.num_keys))]
        in_buckets = torch.zeros(row_ranges[-1].end, 1, 1, dtype=torch.bool, device=device)
        if others:
            in_buckets.index_fill_(0, to_device(stream_rows(others), device), True)
        whole = not others
        return cls(
            fused=FusedPlan.of(fused, device, is_whole_stream=whole) if fused else None,
            buckets=make_buckets(others, reach, num_heads, device),
            in_buckets=in_buckets,
        )


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
class FusedPlan:
    """The grouping of ranges into calls of the fused kernel, the same in every layer: neighbours of
    equal length share a call."""

    runs: Sequence[_Run]
    rows: Tensor | None
    """(n,) int64, the rows of the runs; None if they are the whole stream, in order."""
    key_rows: Tensor | None
    """(m,) int64, the rows that the runs see, run by run; None if they equal ``rows``."""

    @classmethod
    def of(
        cls, row_ranges: Sequence[RowRange], device: torch.device, *, is_whole_stream: bool
    ) -> FusedPlan:
        """``is_whole_stream``: whether the ranges are all rows of the stream, in order."""
        runs = []
        for _, run in groupby(row_ranges, lambda r: (r.length, r.num_before)):
            alike = list(run)
            runs.append(_make_run(alike[0], len(alike), device))
        rows = key_rows = None
        if any(row_range.before for row_range in row_ranges) or not is_whole_stream:
            rows = to_device(stream_rows(row_ranges), device)
            key_rows = to_device(stream_rows(each for r in row_ranges for each in r.seen), device)
        return cls(runs=runs, rows=rows, key_rows=key_rows)


def _make_run(row_range: RowRange, count: int, device: torch.device) -> _Run:
    mask = None
    if row_range.before:
        shape = (row_range.length, row_range.num_keys)
        mask = torch.ones(shape, dtype=torch.bool, device=device).tril(row_range.num_before)
    return _Run(count=count, length=row_range.length, num_before=row_range.num_before, mask=mask)


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: FusedPlan, scaling: float
) -> Tensor:
    """Attention of the rows of a plan; zero for others. (T, Hq, D)"""
    attended = _of_runs(query, key, value, plan, scaling)
    if plan.rows is None:
        return attended
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    return output.index_copy(0, plan.rows, attended)


def _of_runs(query: Tensor, key: Tensor, value: Tensor, plan: FusedPlan, scaling: float) -> Tensor:
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
