"""create_run: a new adapter, fresh or from a checkpoint."""

from __future__ import annotations

from futures.finishing import Outcome
from training.engine.interface import Trainer
from training.kinds import CreateRun
from training.models import Run
from training.worker import outcomes
from training.worker.kinds.barrier import BarrierContext, LoggedBarrier
from training.worker.kinds.load_weights import load_checkpoint, note_loaded


class CreateRunKind(LoggedBarrier[CreateRun, int]):
    """The first request of every run's log."""

    def apply(self, trainer: Trainer, run: Run, request: CreateRun) -> int:
        if request.source is not None:
            return load_checkpoint(trainer, run, request.source)
        trainer.create_adapter(run.id, request.lora_config)
        return 0

    def prepare(self, context: BarrierContext) -> None:
        context.adapter_cache.make_room(context.run)

    def outcome(self, context: BarrierContext, request: CreateRun, applied: int) -> Outcome:
        run = context.run
        context.adapter_cache.created(run)
        context.effects.writes.append((context.future, lambda: _leave_creating(run)))
        result = {
            "model_id": run.name,
            "base_model": run.base_model,
            "rank": run.rank,
            "alpha": run.alpha,
        }
        if request.source is not None:
            note_loaded(context, step=applied)
            result["path"] = request.source.path
        return outcomes.ready(context.future, result, rank=run.rank)


def _leave_creating(run: Run) -> None:
    """Mark the run as created, unless its owner removed it meanwhile."""
    Run.objects.filter(id=run.id, state=Run.RunState.CREATING).update(state=Run.RunState.READY)
