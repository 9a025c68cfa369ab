"""Turns every request of a client into a future of its worker's queue, or refuses it by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.conf import settings

from futures.models import Future
from futures.services import future_repeated, future_submit
from training.base_models import base_model_get
from training.errors import BaseModelNotFound, InvalidRequest, SessionFinished
from training.kinds import Request
from training.models import Run
from training.selectors import run_get
from training.storage_quota import storage_admit
from training.token_quota import token_quota


@dataclass(frozen=True, kw_only=True)
class Submission:
    """An accepted request."""

    future: Future
    model_id: str | None
    """The run's name, None for requests without a run."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a request goes."""

    owner_id: int
    base_model: str | None
    """The worker that runs it; None means that of the default."""
    lane_id: str | None = None
    """The run's or the sampling session's; None for requests without an order."""
    seq_id: int | None = None
    """The client's number in the lane; with None the server assigns the next."""
    model_id: str | None = None
    """The run's name."""


def run_target(run: Run, *, seq_id: int | None = None) -> Target:
    """The lane of a run, under the client's seq id or the server's next one.

    Raises:
        InvalidRequest: The run's requests are numbered by its SDK client, and this one has no
            number. (400)
        SessionFinished: The run's session has ended. (400)
    """
    if run.session is not None:
        if run.session.finished_at:
            raise SessionFinished
        if seq_id is None:
            raise InvalidRequest(
                f"model_id: {run.name!r} was made by the tinker SDK, whose client numbers its "
                "requests; send the request through that client"
            )
    return Target(
        owner_id=run.owner_id,
        base_model=run.base_model,
        lane_id=run.id,
        seq_id=seq_id,
        model_id=run.name,
    )


def submit(
    request: Request,
    target: Target,
    *,
    delayable: bool = False,
    summary: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
) -> Submission:
    """Store a request for the worker of a base model; a repeat returns the first one's future.

    Args:
        summary: Facts for lists and charts, beside the request's own.

    Raises:
        BaseModelNotFound: It is not served any more, and this is no repeat. (404)
        StorageQuotaExceeded: The owner's storage limit is reached. (413)
        TokenQuotaExceeded: The owner's tokens of the day are used. (403)
        QueueFull, SeqIdReused, IdempotencyKeyReused: As ``future_submit``.
    """
    encoded = request.encoded()
    try:
        queue = base_model_get(target.base_model).queue
    except BaseModelNotFound:
        first = future_repeated(
            payload=encoded,
            owner_id=target.owner_id,
            lane_id=target.lane_id,
            seq_id=target.seq_id,
            idempotency_key=idempotency_key,
        )
        if first is None:
            raise
        return Submission(future=first, model_id=target.model_id)
    storage_admit(
        encoded,
        owner_id=target.owner_id,
        lane_id=target.lane_id,
        seq_id=target.seq_id,
        idempotency_key=idempotency_key,
    )
    with token_quota(
        request,
        encoded,
        owner_id=target.owner_id,
        lane_id=target.lane_id,
        seq_id=target.seq_id,
        idempotency_key=idempotency_key,
    ) as reserved:
        future = future_submit(
            owner_id=target.owner_id,
            queue=queue,
            kind=request.kind,
            payload=encoded,
            lane_id=target.lane_id,
            seq_id=target.seq_id,
            cost=request.cost,
            delayable=delayable,
            interruptible=request.is_interruptible,
            summary={**request.summary, **(summary or {}), **reserved},
            idempotency_key=idempotency_key,
            max_pending=settings.MAX_PENDING,
        )
    return Submission(future=future, model_id=target.model_id)


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
