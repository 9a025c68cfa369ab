"""Lays out parts of jobs as packed micro-batches, the input of the model, the head and the losses.

A micro-batch is one stream of whole datums without padding. A shared prefix of one part's datums
is there once, so three things are counted: the N tokens of all datums,
the T rows of the stream, and the S rows that the head scores, which are rows of the stream, each
with the targets of its tokens. If datums share nothing, the three are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.engine.torch.packing.plan import Piece, PlannedJob, plan_pieces
from training.engine.torch.packing.prefix_tree import lay_out
from training.engine.torch.packing.ranges import RowRange
from training.engine.torch.packing.stream import MIN_ROWS
from training.types import Datum


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedDatum:
    """One datum's tokens in a micro-batch, and its origin."""

    planned: PlannedJob
    index: int
    """Its index among the job's datums."""
    start: int
    """Its first token among the N."""
    row_ranges: Sequence[RowRange]
    """Its rows in the stream."""

    @property
    def end(self) -> int:
        return self.start + len(self.datum.model_input)

    @property
    def datum(self) -> Datum:
        return self.planned.job.data[self.index]

    @property
    def num_targets(self) -> int:
        """K, targets per token."""
        targets = self.datum.loss_fn_inputs["target_tokens"]
        return 1 if targets.ndim == 1 else targets.shape[1]


@dataclass(frozen=True, kw_only=True)
class PartSpan:
    """Rows of one part: in the stream, and among those that the head scores."""

    part: tuple[str, int]
    rows: tuple[int, int]
    scored: tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class LossSpan:
    """Tokens of one loss function with one config."""

    loss_fn: str
    config: Mapping[str, float]
    num_targets: int
    start: int
    end: int
    whole: PackedDatum | None
    """The one datum of a loss that is not elementwise; None if the tokens may be cut anywhere."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """Datums that go through the model together.

    A stream of fewer than ``MIN_ROWS`` rows ends in padding, a sequence that belongs to no part
    and no loss.
    """

    datums: Sequence[PackedDatum]
    """In the order of their tokens, from 0, without gaps."""
    part_spans: Sequence[PartSpan]
    loss_spans: Sequence[LossSpan]
    row_ranges: Sequence[RowRange]
    """The ranges of the stream, in order."""
    tokens: NDArray[np.int64]
    """(T,)"""
    position_ids: NDArray[np.int64]
    """(T,), each row's position in its own datum."""
    scored_rows: NDArray[np.int64]
    """(S,) ascending: each scored row's row in the stream."""
    targets: NDArray[np.int64]
    """(S, K), K the largest in the batch; rows with fewer are padded with token 0."""
    places: NDArray[np.int64]
    """(N,): the scored row of each token."""
    inputs: Mapping[str, NDArray[np.float32]]
    """(N, K) for each input that a loss of the batch needs; 0 for tokens of other losses."""

    def rows_longer_than(self, num_tokens: int | None) -> NDArray[np.bool_] | None:
        """(T,) whether a row's datums are longer; None if none is, or ``num_tokens`` is None."""
        if num_tokens is None:
            return None
        is_long = np.zeros(len(self.tokens), np.bool_)
        for packed in self.datums:
            if packed.end - packed.start > num_tokens:
                for row_range in packed.row_ranges:
                    is_long[row_range.start : row_range.end] = True
        return is_long if is_long.any() else None


def plan_micro_batches(
    jobs: Sequence[PlannedJob], token_budget: int, *, rotary_switch: int | None = None
) -> list[MicroBatch]:
    """Pack every datum of every job once.

    Args:
        jobs: Either all of them train, or none.
        token_budget: Most rows in a micro-batch, unless a single datum is longer.
        rotary_switch: Longer datums share nothing with others; see ``BaseModel``.
    """
    planned = plan_pieces(jobs, token_budget, rotary_switch=rotary_switch)
    return [_make_batch(pieces) for pieces in planned]


def _make_batch(pieces: Sequence[Piece]) -> MicroBatch:
    datums, part_rows = _packed(pieces)
    rows = np.concatenate([np.arange(s.start, s.end) for p in datums for s in p.row_ranges])  # (N,)
    targets, inputs = _loss_inputs(datums)
    scored, places = _scored_tokens(rows, targets)
    row_ranges = list(
        dict.fromkeys(row_range for packed in datums for row_range in packed.row_ranges)
    )
    num_rows = row_ranges[-1].end
    if num_rows < MIN_ROWS:
        row_ranges.append(RowRange(start=num_rows, length=MIN_ROWS - num_rows))
    tokens = np.zeros(row_ranges[-1].end, np.int64)
    for packed in datums:
        for row_range in packed.row_ranges:
            own = slice(row_range.num_before, row_range.num_keys)
            tokens[row_range.start : row_range.end] = packed.datum.model_input[own]
    return MicroBatch(
        datums=datums,
        part_spans=[
            PartSpan(part=piece.part, rows=bounds, scored=_between(rows[scored], *bounds))
            for piece, bounds in zip(pieces, part_rows, strict=True)
        ],
        loss_spans=_loss_spans(datums),
        row_ranges=row_ranges,
        tokens=tokens,
        position_ids=np.concatenate([np.arange(s.num_before, s.num_keys) for s in row_ranges]),
        scored_rows=rows[scored],
        targets=targets[scored],
        places=places,
        inputs=inputs,
    )


def _packed(pieces: Sequence[Piece]) -> tuple[list[PackedDatum], list[tuple[int, int]]]:
    """Every datum with its rows and tokens, and the range of rows of each piece."""
    datums: list[PackedDatum] = []
    part_rows: list[tuple[int, int]] = []
    first_row = first_token = 0
    for piece in pieces:
        lengths = [item.num_tokens for item in piece.items]
        laid_out = lay_out(lengths, [item.path for item in piece.items], first_row)
        for item, row_ranges in zip(piece.items, laid_out, strict=True):
            datums.append(
                PackedDatum(
                    planned=item.planned, index=item.index, start=first_token, row_ranges=row_ranges
                )
            )
            first_token += item.num_tokens
        part_rows.append((first_row, first_row + piece.num_rows))
        first_row += piece.num_rows
    return datums, part_rows


def _scored_tokens(
    rows: NDArray[np.int64], targets: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tokens to score so that every token has a score: the first of each row, and others with
    different targets.

    Args:
        rows: (N,), every row of the stream at least once.
        targets: (N, K).

    Returns:
        (S,) the tokens to score in order of their rows, and (N,) the index of each token's score.
    """
    _, first, row_of_token = np.unique(rows, return_index=True, return_inverse=True)
    is_other = (targets != targets[first[row_of_token]]).any(axis=1)
    others = np.flatnonzero(is_other)
    chosen = np.concatenate([first, others])
    order = np.argsort(rows[chosen], kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    places = place[row_of_token]
    places[others] = place[len(first) :]
    return chosen[order], places


def _between(ascending: NDArray[np.int64], low: int, high: int) -> tuple[int, int]:
    """The range of indices whose numbers are at least ``low`` and less than ``high``."""
    start, end = np.searchsorted(ascending, (low, high))
    return int(start), int(end)


def _loss_inputs(
    datums: Sequence[PackedDatum],
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float32]]]:
    """(N, K) targets, and the losses' inputs by name."""
    shape = (datums[-1].end, max(packed.num_targets for packed in datums))
    names = {name for packed in datums for name in packed.planned.float_inputs}
    targets = np.zeros(shape, np.int64)
    inputs = {name: np.zeros(shape, np.float32) for name in sorted(names)}
    for packed in datums:
        own, k = slice(packed.start, packed.end), packed.num_targets
        given = packed.datum.loss_fn_inputs
        targets[own, :k] = given["target_tokens"].reshape(-1, k)
        for name in packed.planned.float_inputs:
            if name in given:
                inputs[name][own, :k] = given[name].reshape(-1, k)
            else:  # a setting for every token; without one it is the weights, which are 1
                inputs[name][own, :k] = packed.planned.config.get(name, 1.0)
    return targets, inputs


def _loss_spans(datums: Sequence[PackedDatum]) -> list[LossSpan]:
    return [
        LossSpan(
            loss_fn=run[0].planned.job.loss_fn,
            config=run[0].planned.config,
            num_targets=run[0].num_targets,
            start=run[0].start,
            end=run[-1].end,
            whole=None if run[0].planned.is_elementwise else run[0],
        )
        for run in _runs(datums, _span_key)
    ]


def _span_key(packed: PackedDatum) -> tuple[Any, ...]:
    """Adjacent datums with the same key share a loss span."""
    alone = None if packed.planned.is_elementwise else packed.start
    return (packed.planned.loss_key, packed.num_targets, alone)


def _runs(
    datums: Sequence[PackedDatum], key: Callable[[PackedDatum], Any]
) -> list[list[PackedDatum]]:
    """Group adjacent datums with the same key."""
    return [list(run) for _, run in groupby(datums, key)]
