"""The micro-batches of a pass in this process.

Ranks that compute different datums collect each layer's weights from each other, so they must run
the same number of micro-batches, with the same choice about recomputing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

import torch

from training.engine.torch.adapters import Adapter
from training.engine.torch.base_model import BaseModel
from training.engine.torch.memory_plan import MemoryPlan, Planned
from training.engine.torch.packing.micro_batches import MicroBatch, plan_micro_batches
from training.engine.torch.packing.plan import Limits, PlannedJob
from training.engine.torch.packing.ranges import RowRange
from training.engine.torch.packing.stream import MIN_ROWS, uniform_segments
from training.engine.torch.sharding.share_of_pass import divide


def rounds(
    base_model: BaseModel,
    jobs: Sequence[PlannedJob],
    adapters: Mapping[str, Adapter],
    token_budget: int,
    memory_plan: MemoryPlan,
    *,
    trains: bool,
) -> Iterator[tuple[MicroBatch | None, Planned | None]]:
    """This process's micro-batches, each with its plan; None is one without datums, beside those of
    other ranks."""

    names = {planned.job.adapter_name for planned in jobs}
    grad_bytes = {name: adapters[name].grad.flat.nbytes for name in names if trains}

    def plan_of(batch: MicroBatch) -> Planned | None:
        layouts = [adapters[span.part[0]].layout for span in batch.part_spans if trains]
        return memory_plan.of_pass(batch.row_ranges, layouts)

    def batches_of(chosen: Mapping[PlannedJob, range] | None) -> list[MicroBatch]:
        return plan_micro_batches(
            jobs,
            Limits(
                token_budget=token_budget,
                piece_rows=base_model.enough_rows,
                is_split=base_model.holder.team.size > 1,
                grad_bytes=grad_bytes,
            ),
            rotary_switch=base_model.rotary_switch,
            fewest_rows=max(MIN_ROWS, base_model.fewest_rows),
            is_packed=not base_model.is_padded,
            chosen=chosen,
        )

    group = base_model.group
    if group is None or not base_model.divides_passes:
        for batch in batches_of(None):
            yield batch, plan_of(batch)
        return
    by_rank = [batches_of(chosen) for chosen in divide(jobs, group.size)]
    for batches in zip_longest(*by_rank):
        plans = [None if batch is None else plan_of(batch) for batch in batches]
        own = plans[group.rank]
        if any(plan is not None and plan.recomputes for plan in plans):
            own = Planned(num_bytes=0 if own is None else own.num_bytes, recomputes=True)
        yield batches[group.rank], own


def run_beside_others(base_model: BaseModel, *, recomputes: bool) -> None:
    """Take part in the other ranks' pass, forwards and backwards, without datums."""
    tokens = torch.zeros(MIN_ROWS, dtype=torch.int64, device=base_model.device)
    hidden = base_model.sequence_states(
        tokens,
        torch.arange(MIN_ROWS, device=base_model.device),
        uniform_segments(MIN_ROWS, None),
        [RowRange(start=0, length=MIN_ROWS)],
        recomputes=recomputes,
    )
    if hidden.requires_grad:
        hidden.backward(torch.zeros_like(hidden))
