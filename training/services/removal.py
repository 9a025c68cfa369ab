"""Removals of runs, which are accepted despite all limits, and without a worker."""

from __future__ import annotations

from django.db import transaction

from futures.cancelling import lane_refuse
from futures.models import Lane
from futures.services import Refusal, future_submit
from training.base_models import queue_is_served
from training.errors import BaseModelNotFound
from training.kinds import Kind, RemoveRun, RemoveRunResult
from training.models import Run
from training.services.submission import Submission
from training.storage.chosen import storage


def submit_removal(run: Run, *, idempotency_key: str | None = None) -> Submission:
    """Submit the removal of a run; if its base model is no longer served, it is done at once.

    The run may be an SDK client's, whose other requests need a number, and its session may have
    ended.

    Raises:
        IdempotencyKeyReused: As ``future_submit``.
    """
    queue = Lane.objects.get(pk=run.id).queue
    result = None
    if not queue_is_served(queue):
        _abandon(run)
        result = RemoveRunResult(model_id=run.name).encoded()
    request = RemoveRun()
    future = future_submit(
        owner_id=run.owner_id,
        queue=queue,
        kind=request.kind,
        payload=request.encoded(),
        lane_id=run.id,
        idempotency_key=idempotency_key,
        result=result,
    )
    return Submission(future=future, model_id=run.name)


def _abandon(run: Run) -> None:
    """Remove a run without a worker: its snapshots are deleted, and its waiting requests fail.

    For a run whose base model is no longer served. Its memory was freed with the last worker.
    """
    lane_refuse(
        lane_id=run.id,
        but=Kind.REMOVE_RUN,  # an earlier removal, whose client repeats it
        refusal=Refusal(
            error=f"Model {run.name!r} was removed while this server does not serve its base "
            f"model {run.base_model}.",
            error_code=BaseModelNotFound.__name__,
        ),
    )
    snapshots = list(run.snapshots.all())
    run.snapshots.all().delete()

    def delete_files() -> None:
        for snapshot in snapshots:
            storage().delete(snapshot.directory)

    transaction.on_commit(delete_files)
