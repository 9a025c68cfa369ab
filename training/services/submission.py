"""Turns every request of a client into a future in its run's lane, or refuses it by name."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.db import transaction

from futures.cancelling import lane_refuse
from futures.models import Future, Lane
from futures.services import Refusal, future_repeated, future_submit
from training.base_models import base_model_get, queue_is_served
from training.errors import BaseModelNotFound, InvalidRequest, SessionFinished
from training.kinds import Kind, Request
from training.models import Run
from training.selectors import run_get
from training.storage_quota import storage_admit


@dataclass(frozen=True, kw_only=True)
class Submission:
    """An accepted request."""

    future: Future
    model_id: str | None
    """The run's name, None for requests without a run."""


def submit_in_lane(
    run: Run,
    request: Request,
    *,
    delayable: bool = False,
    summary: Mapping[str, Any] | None = None,
    seq_id: int | None = None,
    idempotency_key: str | None = None,
) -> Submission:
    """Submit a request of a run, under the client's seq id or the server's next one.

    Args:
        summary: Facts for lists and charts, beside the request's own.

    Raises:
        InvalidRequest: The run's requests are numbered by its SDK client, and this one has no
            number;
            only its removal needs none. (400)
        SessionFinished: The run's session has ended; only its removal is accepted. (400)
        BaseModelNotFound: Its base model is not served any more, and this is no repeat. (404)
        StorageQuotaExceeded: Its owner's storage limit is reached. (413)
        QueueFull, SeqIdReused, IdempotencyKeyReused: As ``future_submit``.
    """
    is_removal = request.kind == Kind.REMOVE_RUN
    if run.session is not None and not is_removal:
        if run.session.finished_at:
            raise SessionFinished
        if seq_id is None:
            raise InvalidRequest(
                f"model_id: {run.name!r} was made by the tinker SDK, whose client numbers its "
                "requests; send the request through that client"
            )
    if not is_removal:
        future = submit(
            request,
            owner_id=run.owner_id,
            base_model=run.base_model,
            lane_id=run.id,
            seq_id=seq_id,
            delayable=delayable,
            summary=summary,
            idempotency_key=idempotency_key,
        )
        return Submission(future=future, model_id=run.name)
    # A removal is accepted despite all limits, and even if its base model is no longer served.
    queue = Lane.objects.get(pk=run.id).queue
    result = None
    if not queue_is_served(queue):
        _abandon(run)
        result = {"status": "deleted", "model_id": run.name}
    future = future_submit(
        owner_id=run.owner_id,
        queue=queue,
        kind=request.kind,
        payload=request.encoded(),
        lane_id=run.id,
        seq_id=seq_id,
        idempotency_key=idempotency_key,
        result=result,
    )
    return Submission(future=future, model_id=run.name)


def submit(
    request: Request,
    *,
    owner_id: int,
    base_model: str | None,
    lane_id: str | None,
    seq_id: int | None,
    delayable: bool = False,
    summary: Mapping[str, Any] | None = None,
    idempotency_key: str | None,
) -> Future:
    """Store a request for the worker of a base model; a repeat returns the first one's future.

    Args:
        base_model: None means the default.
        summary: Facts for lists and charts, beside the request's own.

    Raises:
        BaseModelNotFound: It is not served any more, and this is no repeat. (404)
        StorageQuotaExceeded: The owner's storage limit is reached. (413)
        QueueFull, SeqIdReused, IdempotencyKeyReused: As ``future_submit``.
    """
    encoded = request.encoded()
    try:
        queue = base_model_get(base_model).queue
    except BaseModelNotFound:
        first = future_repeated(
            payload=encoded,
            owner_id=owner_id,
            lane_id=lane_id,
            seq_id=seq_id,
            idempotency_key=idempotency_key,
        )
        if first is None:
            raise
        return first
    storage_admit(
        encoded,
        owner_id=owner_id,
        lane_id=lane_id,
        seq_id=seq_id,
        idempotency_key=idempotency_key,
    )
    return future_submit(
        owner_id=owner_id,
        queue=queue,
        kind=request.kind,
        payload=encoded,
        lane_id=lane_id,
        seq_id=seq_id,
        cost=request.cost,
        delayable=delayable,
        interruptible=request.is_interruptible,
        summary={**request.summary, **(summary or {})},
        idempotency_key=idempotency_key,
        max_pending=settings.MAX_PENDING,
    )


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
            shutil.rmtree(settings.DATA_DIR / snapshot.directory, ignore_errors=True)

    transaction.on_commit(delete_files)


def run_repeated(owner_id: int, idempotency_key: str | None) -> Run | None:
    """The run of an earlier request with this key."""
    if idempotency_key is None:
        return None
    first = Future.objects.filter(owner_id=owner_id, idempotency_key=idempotency_key)
    return Run.objects.filter(id__in=first.values("lane_id")).first()


def run_asked(*, owner_id: int, model_id: str, idempotency_key: str | None) -> Run:
    """The run of a request: that of its first submission, which may be
    removed while another has its name; else the live run of this name.

    Raises:
        RunNotFound: (404)
    """
    first = run_repeated(owner_id, idempotency_key)
    if first is not None and first.name == model_id:
        return first
    return run_get(owner_id=owner_id, model_id=model_id)
