"""Reads: one future, the futures that became final in a lane, whether a queue is served."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from django.utils import timezone

from futures.errors import FutureNotFound, FuturePurged
from futures.lost_workers import OPEN
from futures.models import Future, Worker
from futures.transitions import FINAL_STATES, State

HEARTBEAT_TIMEOUT = timedelta(seconds=30)
"""A worker without a heartbeat for this long counts as gone."""

ACTIVE, PAUSED = "active", "paused_capacity"
"""Whether a queue is served, in the SDK's words."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class QueueState:
    """Whether a queue is served, as the owner of a waiting future is told."""

    state: str
    """``ACTIVE`` or ``PAUSED``."""
    reason: str
    """A sentence; empty while active."""
    futures_per_second: float | None = None
    """The workers' recent rate while they had work; None until one has finished a future."""
    started_at: datetime | None = None
    """When the first of its workers started; None if there is none."""
    workers: int = 0
    """How many workers serve it."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A future that became final."""

    request_id: str
    is_ready: bool
    """False: it failed or was cancelled."""


def future_get(*, request_id: str, owner_id: int, with_result: bool = False) -> Future:
    """The owner's future, without its payload, and without its result unless asked for.

    Raises:
        FutureNotFound: The owner has no such future; another owner's counts as none. (404)
        FuturePurged: The result was asked for and has been pruned. (410)
    """
    hidden = ("payload",) if with_result else ("payload", "result")
    future = Future.objects.defer(*hidden).filter(pk=request_id, owner_id=owner_id).first()
    if future is None:
        raise FutureNotFound.named(request_id)
    if with_result and future.state == State.READY and future.pruned_at is not None:
        raise FuturePurged
    return future


def lane_completions(
    *, lane_id: str, seq_ids: range, after: int, limit: int = 2000
) -> tuple[list[Completion], int]:
    """Futures of an unordered lane that became final after a cursor, and the cursor after them.

    A cursor is the microsecond of the last completion returned. A worker commits one batch after
    another, each later than the last, so none of its results can appear before a cursor that comes
    from its own results. Other workers and cancellations are commits of other processes. A caller
    that must not miss a result that was committed at the same time as a later-dated one of another
    process looks back a moment now and then.

    Args:
        seq_ids: Only these.
        after: 0 for all.
        limit: Most to return at one time, except that completions of the same microsecond stay
            together.
    """
    final = Future.objects.filter(
        lane_id=lane_id,
        seq_id__gte=seq_ids.start,
        seq_id__lt=seq_ids.stop,
        state__in=FINAL_STATES,
        finished_at__gt=_EPOCH + timedelta(microseconds=after),
    )
    rows = list(final.order_by("finished_at").only("state", "finished_at")[:limit])
    if not rows:
        return [], after
    last = cast(datetime, rows[-1].finished_at)
    if len(rows) == limit:
        told = [future.id for future in rows]
        rows += final.filter(finished_at=last).exclude(id__in=told).only("state", "finished_at")
    completions = [Completion(future.id, future.state == State.READY) for future in rows]
    return completions, (last - _EPOCH) // timedelta(microseconds=1)


def queue_state(queue: str) -> QueueState:
    """Whether a worker serves the queue now, and if not, why."""
    workers = Worker.objects.filter(queue=queue).order_by("-id")
    workers = workers.only("state", "heartbeat_at", "figures", "started_at")
    opened = list(workers.filter(state__in=OPEN))
    heard = timezone.now() - HEARTBEAT_TIMEOUT
    serving = [
        worker
        for worker in opened
        if worker.state == Worker.WorkerState.LIVE and worker.heartbeat_at >= heard
    ]
    if serving:
        rates = [worker.figures.get("futures_per_second") for worker in serving]
        known = [rate for rate in rates if rate is not None]
        since = min(worker.started_at for worker in serving)
        return QueueState(ACTIVE, "", sum(known) if known else None, since, len(serving))
    newest = opened[0] if opened else workers.first()
    if newest is None or newest.state == Worker.WorkerState.STOPPED:
        return QueueState(PAUSED, "No worker serves this queue at the moment.")
    if newest.state == Worker.WorkerState.LOST:
        return QueueState(PAUSED, "The worker has ended; its requests wait for the next one.")
    if newest.state == Worker.WorkerState.STARTING:
        return QueueState(PAUSED, "The worker is starting.", started_at=newest.started_at)
    return QueueState(PAUSED, "The worker does not answer.", started_at=newest.started_at)


def worker_figure(queue: str, name: str) -> Any:
    """The value that the queue's newest worker with a figure of this name reported, or None."""
    said = Worker.objects.filter(queue=queue, figures__has_key=name).order_by("-pk")
    figures = said.values_list("figures", flat=True).first()
    return None if figures is None else figures[name]
