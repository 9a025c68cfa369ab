"""Jobs of many adapters cut into packed micro-batches under a token budget.

A micro-batch is one stream of whole datums without padding. Datums of one part are adjacent
(LoRA matrices are applied part by part), within it those of one loss, and within that the
longest first, so that equal lengths meet and attention can take them together.

A part is what shares its products with LoRA matrices: one job where bits count, all jobs of an
adapter where speed does. Each part's datums are first cut into pieces by themselves, and
micro-batches are made of whole pieces, in order. So which datums are summed, and in which order,
does not depend on the other parts of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from training.engine.interface import ForwardBackwardJob
from training.engine.packed import MIN_ROWS
from training.loss_fns import CUSTOM, LOSS_FNS
from training.types import Datum

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedJob:
    """A job that was checked, with its loss's complete config."""

    job: ForwardBackwardJob
    config: Mapping[str, float]
    part: tuple[str, int]
    """Jobs of one part share their matrix products. The adapter's name, and a number that tells
    its parts apart."""

    @property
    def float_inputs(self) -> tuple[str, ...]:
        """Inputs with a value for each target; what a custom loss reads, it reads by datum."""
        loss_fn = self.job.loss_fn
        return () if loss_fn == CUSTOM else LOSS_FNS[loss_fn].float_inputs

    @property
    def is_elementwise(self) -> bool:
        """Whether the loss of a token depends on that token alone."""
        return self.job.loss_fn != CUSTOM and LOSS_FNS[self.job.loss_fn].is_elementwise


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedDatum:
    """One datum's rows in a micro-batch, and where it came from."""

    planned: PlannedJob
    index: int
    """Which of the job's datums it is."""
    start: int
    end: int

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
    """Rows of one part."""

    part: tuple[str, int]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, eq=False)
class LossSpan:
    """Rows that one loss function with one config speaks about."""

    loss_fn: str
    config: Mapping[str, float]
    num_targets: int
    start: int
    end: int
    whole: PackedDatum | None
    """The one datum of a loss that is not elementwise; None if the rows may be cut anywhere."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """T rows that pass through the model together.

    A batch of fewer than ``MIN_ROWS`` tokens ends in padding, a sequence that belongs to no
    part and no loss.
    """

    datums: Sequence[PackedDatum]
    """In stream order, from row 0, without gaps."""
    part_spans: Sequence[PartSpan]
    loss_spans: Sequence[LossSpan]
    tokens: NDArray[np.int64]
    """(T,)"""
    position_ids: NDArray[np.int64]
    """(T,), restarting with each datum."""
    targets: NDArray[np.int64]
    """(T, K), K the largest in the batch; token 0 fills the rows that have fewer."""
    inputs: Mapping[str, NDArray[np.float32]]
    """(T, K) for each input that a loss here needs; 0 where a row's loss does not."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence; they add up to T."""
        padding = len(self.tokens) - self.datums[-1].end
        lengths = [packed.end - packed.start for packed in self.datums]
        return [*lengths, padding] if padding else lengths


def plan_micro_batches(jobs: Sequence[PlannedJob], token_budget: int) -> list[MicroBatch]:
    """Pack every datum of every job once.

    Args:
        jobs: All of them train, or none does.
        token_budget: Most tokens in a micro-batch, unless one datum alone is longer.
    """
    loss_order = _first_seen(_loss_key(planned) for planned in jobs)
    by_part: dict[tuple[str, int], list[_Item]] = {}
    for planned in jobs:
        items = by_part.setdefault(planned.part, [])
        items += [_Item(planned, index) for index in range(len(planned.job.data))]
    pieces = [
        piece
        for items in by_part.values()
        for piece in _cut(
            sorted(items, key=lambda i: (loss_order[_loss_key(i.planned)], -i.num_tokens)),
            lambda item: item.num_tokens,
            token_budget,
        )
    ]
    batches = _cut(pieces, lambda piece: sum(item.num_tokens for item in piece), token_budget)
    return [_make_batch(_lay_out(item for piece in batch for item in piece)) for batch in batches]


@dataclass(frozen=True, eq=False)
class _Item:
    """One datum that has no rows yet."""

    planned: PlannedJob
    index: int

    @property
    def num_tokens(self) -> int:
        return len(self.planned.job.data[self.index].model_input)


def _cut(values: Iterable[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """Neighbours together as long as their sizes add up to at most ``limit``."""
    parts: list[list[T]] = []
    total = 0
    for value in values:
        if not parts or total + size(value) > limit:
            parts.append([])
            total = 0
        parts[-1].append(value)
        total += size(value)
    return parts


def _lay_out(items: Iterable[_Item]) -> list[PackedDatum]:
    """Give each item its rows, one after another."""
    packed: list[PackedDatum] = []
    start = 0
    for item in items:
        end = start + item.num_tokens
        packed.append(PackedDatum(planned=item.planned, index=item.index, start=start, end=end))
        start = end
    return packed


def _make_batch(datums: Sequence[PackedDatum]) -> MicroBatch:
    num_targets = max(packed.num_targets for packed in datums)
    names = {name for packed in datums for name in packed.planned.float_inputs}
    padding = max(0, MIN_ROWS - datums[-1].end)
    shape = (datums[-1].end + padding, num_targets)
    targets = np.zeros(shape, np.int64)
    inputs = {name: np.zeros(shape, np.float32) for name in sorted(names)}
    for packed in datums:
        _fill(packed, targets, inputs)
    return MicroBatch(
        datums=datums,
        part_spans=[
            PartSpan(part=part, start=run[0].start, end=run[-1].end)
            for part, run in _runs(datums, lambda p: p.planned.part)
        ],
        loss_spans=[
            LossSpan(
                loss_fn=run[0].planned.job.loss_fn,
                config=run[0].planned.config,
                num_targets=run[0].num_targets,
                start=run[0].start,
                end=run[-1].end,
                whole=None if run[0].planned.is_elementwise else run[0],
            )
            for _, run in _runs(datums, _span_key)
        ],
        tokens=np.concatenate(
            [*(p.datum.model_input for p in datums), np.zeros(padding, np.int64)]
        ).astype(np.int64),
        position_ids=np.concatenate(
            [*(np.arange(p.end - p.start) for p in datums), np.arange(padding)]
        ),
        targets=targets,
        inputs=inputs,
    )


def _fill(
    packed: PackedDatum, targets: NDArray[np.int64], inputs: Mapping[str, NDArray[np.float32]]
) -> None:
    rows, k = slice(packed.start, packed.end), packed.num_targets
    given = packed.datum.loss_fn_inputs
    targets[rows, :k] = given["target_tokens"].reshape(-1, k)
    for name in packed.planned.float_inputs:
        if name in given:
            inputs[name][rows, :k] = given[name].reshape(-1, k)
        else:  # A setting holds for every token. Else it is the weights, when evaluating.
            inputs[name][rows, :k] = packed.planned.config.get(name, 1.0)


def _loss_key(planned: PlannedJob) -> tuple[Any, ...]:
    return (planned.job.loss_fn, *sorted(planned.config.items()))


def _span_key(packed: PackedDatum) -> tuple[Any, ...]:
    """Neighbours of one key share a loss span."""
    alone = None if packed.planned.is_elementwise else packed.start
    return (_loss_key(packed.planned), packed.num_targets, alone)


def _first_seen(values: Iterable[Any]) -> dict[Any, int]:
    order: dict[Any, int] = {}
    for value in values:
        order.setdefault(value, len(order))
    return order


def _runs(
    datums: Sequence[PackedDatum], key: Callable[[PackedDatum], Any]
) -> list[tuple[Any, list[PackedDatum]]]:
    """Neighbours with the same key, as (key, neighbours)."""
    return [(value, list(run)) for value, run in groupby(datums, key)]
