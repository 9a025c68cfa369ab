"""Micro-batches of a pass that threads compute at the same time.

Each is computed by one thread from its first layer to its last, so it waits for no other. It adds
to no sum of another, and the results are taken in the order of the micro-batches: no bit depends on
what runs at once, nor on the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Generic, TypeVar

from training.engine.torch.adapters import Adapter
from training.engine.torch.base_model import BaseModel
from training.engine.torch.memory_plan import MemoryPlan, Planned
from training.engine.torch.packing.micro_batches import MicroBatch
from training.loss_fns import CUSTOM

T = TypeVar("T")

Round = tuple[MicroBatch | None, Planned | None]


def lots(base_model: BaseModel, rounds: Iterable[Round]) -> Iterator[list[Round]]:
    """The rounds in order, adjacent ones that may run at once in one list."""
    lot: list[Round] = []
    for batch, plan in rounds:
        if batch is not None and plan is None and _may_have_company(base_model, batch):
            lot.append((batch, plan))
            continue
        if lot:
            yield lot
            lot = []
        yield [(batch, plan)]
    if lot:
        yield lot


def _may_have_company(base_model: BaseModel, batch: MicroBatch) -> bool:
    """Not with images or a client's own loss: what computes those serves one pass at a time."""
    if base_model.enough_rows is None:
        return False
    return not any(
        packed.datum.images or packed.planned.job.loss_fn == CUSTOM for packed in batch.datums
    )


def plan_lot(
    base_model: BaseModel,
    batches: Sequence[MicroBatch],
    adapters: Mapping[str, Adapter],
    memory_plan: MemoryPlan,
    *,
    trains: bool,
) -> tuple[int, Planned | None]:
    """How many of the batches to compute at once: no more than there are threads, or than fit into
    memory. Also the plan for so many of the largest."""
    largest = sorted(batches, key=lambda batch: len(batch.tokens), reverse=True)
    for count in range(min(base_model.holder.team.size, len(batches)), 1, -1):
        together = largest[:count]
        names = [span.part[0] for batch in together for span in batch.part_spans]
        plan = memory_plan.of_pass(
            [row_range for batch in together for row_range in batch.row_ranges],
            [adapters[name].layout for name in names if trains],
        )
        if plan is None or not plan.recomputes:
            return count, plan
    return 1, None


def compute_at_once(
    base_model: BaseModel,
    tasks: Sequence[Callable[[], T]],
    take: Callable[[T], None],
    count: int,
) -> None:
    """Compute tasks, ``count`` at a time, and take their results in order.

    Args:
        take: Runs in the thread of any task, one call at a time.
    """
    results = InOrder(take)

    def compute(number: int) -> None:
        results.put(number, tasks[number]())

    base_model.holder.team.run(
        [partial(compute, number) for number in range(len(tasks))], at_once=count
    )


class InOrder(Generic[T]):
    """Takes results in the order of their numbers, whichever is there first."""

    def __init__(self, take: Callable[[T], None]) -> None:
        self._take = take
        self._waiting: dict[int, T] = {}
        self._next = 0
        self._lock = threading.Lock()

    def put(self, number: int, result: T) -> None:
        with self._lock:
            self._waiting[number] = result
            while self._next in self._waiting:
                self._take(self._waiting.pop(self._next))
                self._next += 1
