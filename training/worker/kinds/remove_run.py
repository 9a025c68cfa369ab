"""remove_run: frees a run's memory and snapshots."""

from __future__ import annotations

from futures.finishing import Outcome
from training.kinds import RemoveRun, RemoveRunResult
from training.worker import outcomes
from training.worker.kinds.barrier import Barrier, BarrierContext


class RemoveRunKind(Barrier[RemoveRun]):
    """Its row is marked removed already."""

    def run(self, context: BarrierContext, request: RemoveRun) -> Outcome:
        context.effects.after_commit.append(lambda: context.adapter_cache.remove_run(context.run))
        return outcomes.ready(context.future, RemoveRunResult(model_id=context.run.name))
