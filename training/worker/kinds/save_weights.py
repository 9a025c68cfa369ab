"""save_weights: a checkpoint of the run's current state.

Files are written before the commit that refers to them: a crash in between leaves a folder that
no row refers to, never a row without its folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

from django.conf import settings
from django.db import IntegrityError, transaction
from django.utils import timezone

from futures.finishing import Outcome
from futures.services import lane_create
from training.age import SUFFIX, encrypt_file
from training.atomic_directory import new_directory
from training.engine.interface import Trainer
from training.errors import CheckpointExists, InvalidRequest, StorageQuotaExceeded
from training.kinds import SaveWeights, SaveWeightsResult
from training.models import Checkpoint, SamplingSession
from training.paths import TinkerPath
from training.services.checkpoints import checkpoint_check_free, checkpoint_place
from training.storage.chosen import storage
from training.storage.interface import CHECKPOINTS, Staged, new_name
from training.storage_quota import storage_check
from training.worker import outcomes
from training.worker.effects import Effects
from training.worker.kinds.barrier import Barrier, BarrierContext
from training.worker.uploads import Later


class SaveWeightsKind(Barrier[SaveWeights]):
    """Reads the run without changing it."""

    def run(self, context: BarrierContext, request: SaveWeights) -> Outcome | Later:
        if request.sampling_session_seq_id is not None:
            return _save_for_sampling_session(context, request.sampling_session_seq_id)
        return _save(context, request, request.name or "")


def _save(context: BarrierContext, request: SaveWeights, name: str) -> Outcome | Later:
    """Save the run under a name."""
    future = context.future
    run, overwrite = context.run, request.overwrite
    path = TinkerPath(run.name, request.checkpoint_kind, name)
    checkpoint_check_free(owner_id=run.owner_id, path=path, overwrite=overwrite)
    row, staged = _staged(context, request.checkpoint_kind, name, request.recipients)
    row.user_metadata = dict(request.user_metadata)
    if request.ttl_seconds is not None:
        row.expires_at = row.created_at + timedelta(seconds=request.ttl_seconds)
    elif settings.CHECKPOINT_TTL_DAYS:
        row.expires_at = row.created_at + timedelta(days=settings.CHECKPOINT_TTL_DAYS)

    def place() -> None:
        with _files_removed_if_refused(row):  # because of another save meanwhile
            checkpoint_place(row, overwrite=overwrite)

    def finish(effects: Effects) -> Outcome:
        effects.writes.append((future, place))
        result = SaveWeightsResult(model_id=run.name, path=str(path), size_bytes=row.size_bytes)
        return outcomes.ready(future, result, path=str(path), bytes=row.size_bytes)

    return _when_stored(context, staged, finish)


def _save_for_sampling_session(context: BarrierContext, number: int) -> Outcome | Later:
    """A frozen sampling session of the current weights.

    Its rows are committed here, before the future's result: another request may take the
    session's number until then, and only the database can decide which was first. After a crash
    in between, the repeat finds the first one's rows.
    """
    future, run = context.future, context.run
    session_id = f"{run.session_id}:sample:{number}"
    made = SamplingSession.objects.filter(
        id=session_id, checkpoint__run=run, checkpoint__seq_id=future.seq_id or 0
    )
    result = SaveWeightsResult(model_id=run.name, sampling_session_id=session_id)
    if made.exists():
        return outcomes.ready(future, result, sampling_session=session_id)
    # No client can request this name: a path may not contain it.
    row, staged = _staged(context, Checkpoint.Kind.SAMPLER, f"~{future.seq_id}", ())
    row.ephemeral = True

    def finish(effects: Effects) -> Outcome:
        try:
            with _files_removed_if_refused(row), transaction.atomic():
                storage_check(owner_id=run.owner_id, more_bytes=row.size_bytes)
                row.save(force_insert=True)
                SamplingSession.objects.create(
                    id=session_id,
                    session_id=run.session_id or "",
                    seq_id=number,
                    base_model=run.base_model,
                    checkpoint=row,
                    model_path=f"tinker://{run.name}/sampler_weights/{row.name}",
                )
                lane_create(
                    lane_id=session_id, owner_id=run.owner_id, queue=future.queue, ordered=False
                )
        except IntegrityError:
            if made.exists():  # by a worker that was given up and was still writing
                return outcomes.ready(future, result, sampling_session=session_id)
            raise InvalidRequest(
                f"sampling_session_seq_id: this session has a sampling session {number} already"
            ) from None
        return outcomes.ready(future, result, sampling_session=session_id, bytes=row.size_bytes)

    return _when_stored(context, staged, finish)


def _when_stored(
    context: BarrierContext, staged: Staged[int], finish: Callable[[Effects], Outcome]
) -> Outcome | Later:
    """The outcome of a save, at once if its files are in the storage already."""
    if staged.is_stored:
        return finish(context.effects)
    return Later(staged.store, finish)


@contextmanager
def _files_removed_if_refused(row: Checkpoint) -> Iterator[None]:
    """Remove the files that were written for a row that cannot be stored."""
    try:
        yield
    except (CheckpointExists, StorageQuotaExceeded, IntegrityError):
        storage().delete(row.directory)
        raise


def _staged(
    context: BarrierContext, kind: str, name: str, recipients: Sequence[str]
) -> tuple[Checkpoint, Staged[int]]:
    """Write the run's files; return the row that will refer to them, and the files."""
    run, trainer = context.run, context.trainer
    directory = new_name(CHECKPOINTS)
    adapter_name = context.adapter_cache.bring_run(run)
    if kind != Checkpoint.Kind.EXTERNAL:
        with_optimizer = kind == Checkpoint.Kind.TRAINING
        make = partial(trainer.save_adapter, adapter_name, with_optimizer=with_optimizer)
    elif recipients:
        make = partial(_save_encrypted, trainer, adapter_name, recipients=recipients)
    else:
        make = partial(trainer.save_peft, adapter_name)
    staged = storage().stage(directory, make)
    row = Checkpoint(
        run=run,
        owner_id=run.owner_id,
        path_run=run.name,
        kind=kind,
        name=name,
        seq_id=context.future.seq_id or 0,
        step=run.step,
        directory=directory,
        size_bytes=staged.value,
        created_at=timezone.now(),
    )
    return row, staged


def _save_encrypted(
    trainer: Trainer, adapter_name: str, target: Path, *, recipients: Sequence[str]
) -> int:
    """peft's files, each as an age file; no unencrypted copy stays on the disk."""
    plain = target.with_name(f".plain-{target.name}")
    try:
        trainer.save_peft(adapter_name, plain)
        with new_directory(target) as temporary:
            for path in plain.iterdir():
                encrypt_file(path, temporary / (path.name + SUFFIX), recipients)
            return sum(path.stat().st_size for path in temporary.iterdir())
    finally:
        shutil.rmtree(plain, ignore_errors=True)
