"""load_weights: loads a checkpoint into a run."""

from __future__ import annotations

from futures.finishing import Outcome
from training.engine.interface import Trainer
from training.errors import CheckpointNotFound
from training.kinds import LoadWeights, LoadWeightsResult
from training.models import Checkpoint, Run
from training.storage.chosen import storage
from training.worker import outcomes
from training.worker.kinds.barrier import BarrierContext, LoggedBarrier


class LoadWeightsKind(LoggedBarrier[LoadWeights, int]):
    """Changes everything of an adapter except its shape."""

    def apply(self, trainer: Trainer, run: Run, request: LoadWeights) -> int:
        return load_checkpoint(trainer, run, request)

    def outcome(self, context: BarrierContext, request: LoadWeights, applied: int) -> Outcome:
        note_loaded(context, step=applied)
        result = LoadWeightsResult(model_id=context.run.name, path=request.path)
        return outcomes.ready(context.future, result, path=request.path)


def load_checkpoint(trainer: Trainer, run: Run, request: LoadWeights) -> int:
    """Load the checkpoint into the run's adapter, which need not be in memory before; return its
    step.

    Raises:
        CheckpointNotFound: The checkpoint was deleted or damaged since. (failed future)
        InvalidRequest: It was made for a base model of another shape. (failed future)
        OutOfMemory: There is not enough memory for it now. (failed future)
    """
    checkpoint = Checkpoint.objects.filter(pk=request.checkpoint).first()
    if checkpoint is None:
        raise CheckpointNotFound(f"{request.path} was deleted or overwritten before its turn came")
    with storage().local(checkpoint.directory) as folder:
        return trainer.load_adapter(run.id, folder, with_optimizer=request.optimizer)


def note_loaded(context: BarrierContext, *, step: int) -> None:
    """Ensure that the checkpoint need not be read again: it may be deleted later, and then the log
    could not be replayed past it."""
    context.run.step = step
    context.effects.seconds[context.run.id] = float("inf")
