"""Reads over many futures: counts, failures, workers.

``owner_id`` None means all owners. Each is one query on an index; bodies are never read.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from django.db.models import Count, Q

from futures.models import Future, FutureQuerySet, Lane, Worker
from futures.transitions import State


def futures_of(owner_id: int | None) -> FutureQuerySet:
    """The futures of one owner, or of all, without payload and result."""
    futures: FutureQuerySet = Future.objects.without_bodies()
    return futures if owner_id is None else futures.owned_by(owner_id)


def futures_open(owner_id: int | None) -> dict[str, int]:
    """State to number of pending and running futures; a state without futures is left out."""
    rows = futures_of(owner_id).open().order_by().values_list("state").annotate(number=Count("pk"))
    return dict(rows)


def futures_failed(owner_id: int | None, *, since: datetime, limit: int) -> list[Future]:
    """The newest failed futures that were submitted since."""
    failed = futures_of(owner_id).filter(state=State.FAILED, created_at__gte=since)
    return list(failed.order_by("-created_at")[:limit])


def futures_replaying(future: Future, *, limit: int) -> list[Future]:
    """The futures that submitted this one's request again, oldest first."""
    replays = Future.objects.without_bodies().filter(replay_of=future)
    return list(replays.order_by("created_at")[:limit])


def futures_cancellable() -> FutureQuerySet:
    """All futures that may still be cancelled."""
    futures: FutureQuerySet = Future.objects.cancellable()
    return futures


def lane_find(lane_id: str) -> Lane | None:
    """The lane of this id, of any owner."""
    return Lane.objects.filter(pk=lane_id).first()


def lane_newest(lane_id: str, *, limit: int) -> list[Future]:
    """The last futures of a lane, the last one first."""
    futures = Future.objects.without_bodies().filter(lane_id=lane_id)
    return list(futures.order_by("-seq_id")[:limit])


def lane_waiting(lane_id: str) -> int:
    """How many futures of a lane have not begun."""
    return Future.objects.filter(lane_id=lane_id, state=State.PENDING).count()


def future_in_lane(lane_id: str, seq_id: int) -> Future | None:
    """The future of this number."""
    return Future.objects.without_bodies().filter(lane_id=lane_id, seq_id=seq_id).first()


def worker_find(epoch: int) -> Worker | None:
    """The worker's life of this epoch."""
    return Worker.objects.filter(pk=epoch).first()


def worker_running(worker: Worker) -> int:
    """The number of futures that a worker holds."""
    return Future.objects.filter(worker=worker, state=State.RUNNING).count()


def workers_of(queues: Collection[str]) -> list[Worker]:
    """The newest worker of each queue and all that live or are marked live; if there is none, the
    last worker of all."""
    newest = Worker.objects.filter(queue__in=queues).order_by("queue", "-id").distinct("queue")
    living = Q(state__in=[Worker.WorkerState.STARTING, Worker.WorkerState.LIVE])
    shown = Worker.objects.filter(living | Q(pk__in=newest.values("pk")))
    return list(shown.order_by("queue")) or list(Worker.objects.order_by("-id")[:1])


def worker_lives_newest(*, limit: int) -> list[Worker]:
    """The last lives of workers of all queues, the last one first."""
    return list(Worker.objects.order_by("-id")[:limit])
