"""create_run: a new adapter: fresh, from a checkpoint, or from files in peft's format."""

from __future__ import annotations

from futures.finishing import Outcome
from training.engine.interface import Trainer
from training.errors import CheckpointNotFound
from training.kinds import CreateRun, CreateRunResult
from training.models import Checkpoint, Run
from training.storage.chosen import storage
from training.worker import outcomes
from training.worker.kinds.barrier import BarrierContext, LoggedBarrier
from training.worker.kinds.load_weights import load_checkpoint, note_loaded


class CreateRunKind(LoggedBarrier[CreateRun, int]):
    """The first request of every run's log."""

    def apply(self, trainer: Trainer, run: Run, request: CreateRun) -> int:
        if request.source is not None:
            return load_checkpoint(trainer, run, request.source)
        if request.upload is not None:
            _import(trainer, run, request.upload)
            return 0
        trainer.create_adapter(run.id, request.lora_config)
        return 0

    def prepare(self, context: BarrierContext) -> None:
        context.adapter_cache.make_room(context.run)

    def outcome(self, context: BarrierContext, request: CreateRun, applied: int) -> Outcome:
        run = context.run
        context.adapter_cache.created(run)
        context.effects.writes.append((context.future, lambda: _leave_creating(run)))
        if request.upload is not None:
            context.effects.writes.append((context.future, lambda: _keep_shape(run)))
        if request.source is not None:
            note_loaded(context, step=applied)
        result = CreateRunResult(
            model_id=run.name,
            base_model=run.base_model,
            rank=run.rank,
            alpha=run.alpha,
            path=None if request.source is None else request.source.path,
        )
        return outcomes.ready(context.future, result, rank=run.rank)


def _import(trainer: Trainer, run: Run, upload_id: int) -> None:
    """Make the adapter from uploaded files, and give the run its shape in the simplest words.

    Raises:
        CheckpointNotFound: The files are gone. (failed future)
        InvalidRequest: They do not fit the base model. (failed future)
    """
    upload = Checkpoint.objects.filter(pk=upload_id).first()
    if upload is None:
        raise CheckpointNotFound("the imported files were deleted before their turn came")
    with storage().local(upload.directory) as folder:
        config = trainer.import_adapter(run.id, folder)
    run.train_mlp, run.train_attn = config.train_mlp, config.train_attn
    run.train_unembed = config.train_unembed
    run.share_across_experts = config.share_across_experts
    run.target_modules = None if config.target_modules is None else [*config.target_modules]


def _keep_shape(run: Run) -> None:
    fields = (
        "train_mlp",
        "train_attn",
        "train_unembed",
        "target_modules",
        "share_across_experts",
    )
    Run.objects.filter(id=run.id).update(**{name: getattr(run, name) for name in fields})


def _leave_creating(run: Run) -> None:
    """Mark the run as created, unless its owner removed it meanwhile."""
    Run.objects.filter(id=run.id, state=Run.RunState.CREATING).update(state=Run.RunState.READY)
