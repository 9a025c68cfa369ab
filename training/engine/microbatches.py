"""Jobs of many adapters cut into packed micro-batches under a token budget. Numpy only.

A micro-batch is one stream of whole datums without padding. Datums of one adapter are adjacent
(its LoRA matrices are then applied once), within it those of one loss, and within that the
longest first, so that equal lengths meet and attention can take them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.engine.interface import ForwardBackwardJob
from training.engine.losses import LOSSES
from training.types import Datum


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedJob:
    """A job that was checked, with its loss's complete config."""

    job: ForwardBackwardJob
    config: Mapping[str, float]


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
class AdapterSpan:
    """Rows of one adapter."""

    adapter_name: str
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


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """T rows that pass through the model together."""

    datums: Sequence[PackedDatum]
    """In stream order; they cover 0..T."""
    adapter_spans: Sequence[AdapterSpan]
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
        return [packed.end - packed.start for packed in self.datums]


def plan_micro_batches(jobs: Iterable[PlannedJob], token_budget: int) -> list[MicroBatch]:
    """Pack every datum of every job once.

    Args:
        jobs: All of them train, or none does.
        token_budget: Most tokens in a micro-batch, unless one datum alone is longer.
    """
    items = [(planned, index) for planned in jobs for index in range(len(planned.job.data))]
    adapter_order = _first_seen(planned.job.adapter_name for planned, _ in items)
    loss_order = _first_seen(_loss_key(planned) for planned, _ in items)

    def sort_key(item: tuple[PlannedJob, int]) -> tuple[int, int, int]:
        planned, index = item
        num_tokens = len(planned.job.data[index].model_input)
        return (
            adapter_order[planned.job.adapter_name],
            loss_order[_loss_key(planned)],
            -num_tokens,
        )

    batches: list[MicroBatch] = []
    pending: list[PackedDatum] = []
    end = 0
    for planned, index in sorted(items, key=sort_key):
        num_tokens = len(planned.job.data[index].model_input)
        if pending and end + num_tokens > token_budget:
            batches.append(_make_batch(pending))
            pending, end = [], 0
        pending.append(PackedDatum(planned=planned, index=index, start=end, end=end + num_tokens))
        end += num_tokens
    if pending:
        batches.append(_make_batch(pending))
    return batches


def _make_batch(datums: Sequence[PackedDatum]) -> MicroBatch:
    num_targets = max(packed.num_targets for packed in datums)
    names = {name for packed in datums for name in LOSSES[packed.planned.job.loss_fn].inputs}
    shape = (datums[-1].end, num_targets)
    targets = np.zeros(shape, np.int64)
    inputs = {name: np.zeros(shape, np.float32) for name in sorted(names)}
    for packed in datums:
        _fill(packed, targets, inputs)
    return MicroBatch(
        datums=datums,
        adapter_spans=[
            AdapterSpan(adapter_name=name, start=run[0].start, end=run[-1].end)
            for name, run in _runs(datums, lambda p: p.planned.job.adapter_name)
        ],
        loss_spans=[
            LossSpan(
                loss_fn=run[0].planned.job.loss_fn,
                config=run[0].planned.config,
                num_targets=run[0].num_targets,
                start=run[0].start,
                end=run[-1].end,
            )
            for _, run in _runs(datums, lambda p: (_loss_key(p.planned), p.num_targets))
        ],
        tokens=np.concatenate([p.datum.model_input for p in datums]).astype(np.int64),
        position_ids=np.concatenate([np.arange(p.end - p.start) for p in datums]),
        targets=targets,
        inputs=inputs,
    )


def _fill(
    packed: PackedDatum, targets: NDArray[np.int64], inputs: Mapping[str, NDArray[np.float32]]
) -> None:
    rows, k = slice(packed.start, packed.end), packed.num_targets
    given = packed.datum.loss_fn_inputs
    targets[rows, :k] = given["target_tokens"].reshape(-1, k)
    for name in LOSSES[packed.planned.job.loss_fn].inputs:
        # Only weights may be absent, when evaluating: every token then counts once.
        inputs[name][rows, :k] = given[name].reshape(-1, k) if name in given else 1.0


def _loss_key(planned: PlannedJob) -> tuple[Any, ...]:
    return (planned.job.loss_fn, *sorted(planned.config.items()))


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
