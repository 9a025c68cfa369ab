"""Lays out parts of jobs as packed micro-batches, the input of the model, the head and the losses.

A micro-batch is one stream of whole datums. A shared prefix of one part's datums is there once, so
three things are counted: the N tokens of all datums, the T rows of the stream, and the S rows that
the head scores, which are rows of the stream, each with the targets of its tokens. If datums share
nothing, the three are the same but for the rows that pad each part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.engine.torch.packing.plan import Item, Limits, Piece, PlannedJob, plan_pieces
from training.engine.torch.packing.prefix_tree import Path, lay_out, shared_paths
from training.engine.torch.packing.ranges import RowRange
from training.engine.torch.packing.stream import MIN_ROWS, ROWS_MULTIPLE, round_up
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

    @property
    def span_key(self) -> tuple[Any, ...]:
        """Adjacent datums with the same key share a loss span."""
        alone = None if self.planned.is_elementwise else self.start
        return (self.planned.loss_key, self.num_targets, alone)


@dataclass(frozen=True, kw_only=True)
class PartSpan:
    """Rows of one part: in the stream, and among those that the head scores."""

    part: tuple[str, int]
    rows: tuple[int, int]
    scored: tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class LossSpan:
    """Tokens of one loss function with one config."""

    first: PackedDatum
    """Its first datum; the others have the same ``span_key``."""
    end: int

    @property
    def tokens(self) -> slice:
        """Its tokens among the N."""
        return slice(self.first.start, self.end)

    @property
    def num_targets(self) -> int:
        return self.first.num_targets

    @property
    def loss_fn(self) -> str:
        return self.first.planned.job.loss_fn

    @property
    def config(self) -> Mapping[str, float]:
        return self.first.planned.config

    @property
    def whole(self) -> PackedDatum | None:
        """The one datum of a loss that is not elementwise; None if the tokens may be cut
        anywhere."""
        return None if self.first.planned.is_elementwise else self.first


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """Datums that go through the model together.

    A stream of too few rows ends in padding, a sequence that belongs to no part and no loss; a
    packed one also if its rows are no multiple of ``ROWS_MULTIPLE``.
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
    jobs: Sequence[PlannedJob],
    limits: Limits,
    *,
    rotary_switch: int | None = None,
    fewest_rows: int = MIN_ROWS,
    is_packed: bool = True,
    chosen: Mapping[PlannedJob, range] | None = None,
) -> list[MicroBatch]:
    """Pack every datum of every job once.

    Args:
        jobs: Either all of them train, or none.
        rotary_switch: Longer datums share nothing with others; see ``BaseModel``.
        fewest_rows: The least rows of a micro-batch.
        is_packed: Whether the stream goes through the model as it is, so that datums may share the
            rows of a prefix.
        chosen: The indices of the datums to pack, by job; None packs all.
    """
    by_part: dict[tuple[str, int], list[PlannedJob]] = {}
    for planned in jobs:
        by_part.setdefault(planned.part, []).append(planned)
    origins: list[tuple[PlannedJob, int]] = []
    parts: dict[tuple[str, int], list[Item]] = {}
    for part, its_jobs in by_part.items():
        first = len(origins)
        origins += [
            (own, index)
            for own in its_jobs
            for index in (range(len(own.job.data)) if chosen is None else chosen.get(own, ()))
        ]
        sequences = [planned.job.data[index].model_input for planned, index in origins[first:]]
        paths: Sequence[Path] = [()] * len(sequences)
        if is_packed:
            datums = [planned.job.data[index] for planned, index in origins[first:]]
            named = [_named_tokens(d) if d.images else d.model_input for d in datums]
            paths = shared_paths(named, rotary_switch=rotary_switch)
        parts[part] = [
            Item(
                number=number,
                num_tokens=len(tokens),
                loss_key=origins[number][0].loss_key,
                path=path,
            )
            for number, (tokens, path) in enumerate(zip(sequences, paths, strict=True), first)
        ]
    multiple = ROWS_MULTIPLE if is_packed else 1
    return [
        _make_batch(origins, pieces, fewest_rows, multiple) for pieces in plan_pieces(parts, limits)
    ]


def _named_tokens(datum: Datum) -> NDArray[Any]:
    """(N,) the tokens of a datum with images, with numbers of their own for those of an image: they
    are equal in equal images only."""
    named = datum.model_input.astype(np.int64)
    for placed in datum.images:
        first = -1 - int.from_bytes(placed.image.digest[:7], "big")
        named[placed.start : placed.end] = first - np.arange(placed.num_tokens)
    return named


def _make_batch(
    origins: Sequence[tuple[PlannedJob, int]],
    pieces: Sequence[Piece],
    fewest_rows: int,
    rows_multiple: int,
) -> MicroBatch:
    """
    Args:
        origins: By an item's number, the job of its datum and the datum's index there.
        fewest_rows: The least rows of the stream.
        rows_multiple: It has a multiple of this many, and so has each piece.
    """
    item_ranges, part_rows = _rows(pieces, rows_multiple)
    datums: list[PackedDatum] = []
    for item, its_ranges in item_ranges:
        planned, index = origins[item.number]
        start = datums[-1].end if datums else 0
        datums.append(PackedDatum(planned=planned, index=index, start=start, row_ranges=its_ranges))
    rows = np.concatenate([np.arange(s.start, s.end) for p in datums for s in p.row_ranges])  # (N,)
    targets, inputs = _loss_inputs(datums)
    scored, places = _scored_tokens(rows, targets)
    distinct = list(dict.fromkeys(one for packed in datums for one in packed.row_ranges))
    num_rows = part_rows[-1][1]
    row_ranges = _without_gaps(distinct, num_rows)
    if missing := round_up(max(fewest_rows, num_rows), rows_multiple) - num_rows:
        row_ranges.append(RowRange(start=num_rows, length=missing))
    tokens, positions = np.zeros((2, row_ranges[-1].end), np.int64)
    for packed in datums:
        for row_range in packed.row_ranges:
            own = slice(row_range.num_before, row_range.num_keys)
            tokens[row_range.start : row_range.end] = packed.datum.model_input[own]
            positions[row_range.start : row_range.end] = np.arange(own.start, own.stop)
    for piece, (start, end) in zip(pieces, part_rows, strict=True):
        # Padding is of a token whose numbers are finite, at position 0: one beyond the rotary
        # switch would change the factors of all.
        real_end = start + piece.num_rows
        tokens[real_end:end] = tokens[real_end - 1]
    spans = [list(span) for _, span in groupby(datums, lambda packed: packed.span_key)]
    return MicroBatch(
        datums=datums,
        part_spans=[
            PartSpan(part=piece.part, rows=bounds, scored=_between(rows[scored], *bounds))
            for piece, bounds in zip(pieces, part_rows, strict=True)
        ],
        loss_spans=[LossSpan(first=span[0], end=span[-1].end) for span in spans],
        row_ranges=row_ranges,
        tokens=tokens,
        position_ids=positions,
        scored_rows=rows[scored],
        targets=targets[scored],
        places=places,
        inputs=inputs,
    )


def _rows(
    pieces: Sequence[Piece], multiple: int
) -> tuple[list[tuple[Item, list[RowRange]]], list[tuple[int, int]]]:
    """Every item with its rows in the stream, and the range of rows of each piece, which ends with
    padding up to a multiple of this many."""
    item_ranges: list[tuple[Item, list[RowRange]]] = []
    part_rows: list[tuple[int, int]] = []
    first_row = 0
    for piece in pieces:
        lengths = [item.num_tokens for item in piece.items]
        laid_out = lay_out(lengths, [item.path for item in piece.items], first_row)
        item_ranges += zip(piece.items, laid_out, strict=True)
        end = first_row + round_up(piece.num_rows, multiple)
        part_rows.append((first_row, end))
        first_row = end
    return item_ranges, part_rows


def _without_gaps(row_ranges: Sequence[RowRange], end: int) -> list[RowRange]:
    """The ranges with the padding that follows them, up to a stream's ``end``: a range does not see
    later rows, and padding in a range of its own would need operations of its own."""
    ends = [*(row_range.start for row_range in row_ranges[1:]), end]
    return [
        row_range if row_range.end == end else replace(row_range, length=end - row_range.start)
        for row_range, end in zip(row_ranges, ends, strict=True)
    ]


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
