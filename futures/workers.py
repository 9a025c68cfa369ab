"""The life of a worker: one per queue, each life with an epoch that fences its commits.

Two guards keep a second worker out. A lock (``futures.queue_lock``) shows whether the process
lives; Postgres frees it when the process dies, however it dies. The worker's row says which epoch
may commit; a constraint allows one open row per queue. Recovery happens at the next worker's start:
it does not depend on any timeout. A supervisor that sees a worker's process end may mark the row
earlier, so that nobody believes it alive.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

from django.db import transaction
from django.db.models import QuerySet
from django.utils import timezone

from futures.broker import doorbell
from futures.database import alias, execute
from futures.errors import Fenced, QueueTaken
from futures.finishing import futures_release
from futures.models import Worker
from futures.notify import notify_bell, notify_finished
from futures.queue_lock import QueueLock

MAX_ATTEMPTS = 3
"""A future fails at this many crashes of workers that ran it, if it ran alone at the last one."""

MAX_INTERRUPTIONS = 10
"""The same for workers that were ended from outside. The cause is probably not the future, but a
future that ends the whole machine each time looks the same, and must not be repeated forever."""

CRASHED = "This request stopped the worker %d times, so it is not tried again."

_OPEN = (Worker.WorkerState.STARTING, Worker.WorkerState.LIVE)

# Nothing that the queue's former epochs hold is visible yet: all of it waits again, except
# futures that have stopped too many workers. A crash with many running futures does not show the
# cause, so it makes them suspects, which run alone; only one that ran alone is failed.
_TAKE_OVER = """
WITH held AS (
    SELECT id, count(*) OVER () = 1 AS was_alone,
        attempts + %(crashed)s::int AS attempts,
        interruptions + (NOT %(crashed)s)::int AS interruptions
    FROM futures_future
    WHERE state = 'running'
        AND worker_id IN (SELECT id FROM futures_worker WHERE queue = %(queue)s)
), judged AS (
    SELECT id, attempts, interruptions, was_alone AND CASE WHEN %(crashed)s
        THEN attempts >= %(max_attempts)s ELSE interruptions >= %(max_interruptions)s
    END AS is_spent
    FROM held
), taken AS (
    UPDATE futures_future AS f
    SET attempts = judged.attempts, interruptions = judged.interruptions,
        state = CASE WHEN is_spent THEN 'failed' ELSE 'pending' END,
        worker_id = CASE WHEN is_spent THEN worker_id END,
        started_at = CASE WHEN is_spent THEN started_at END,
        finished_at = CASE WHEN is_spent THEN statement_timestamp() END,
        error = CASE WHEN is_spent THEN %(error)s ELSE '' END,
        category = CASE WHEN is_spent THEN 'server' ELSE '' END,
        error_code = CASE WHEN is_spent THEN 'CrashedWorker' ELSE '' END
    FROM judged WHERE f.id = judged.id AND f.state = 'running'
    RETURNING f.id, f.lane_id, f.seq_id, f.state
), moved AS (
    UPDATE futures_lane AS l SET next_seq_id = least(l.next_seq_id, first.seq_id)
    FROM (
        SELECT lane_id, min(seq_id) AS seq_id FROM taken WHERE state = 'pending' GROUP BY lane_id
    ) AS first
    WHERE l.id = first.lane_id AND l.ordered
)
SELECT id FROM taken WHERE state = 'failed'
"""


def _crashed(before: Worker) -> bool:
    """The assumption about a worker whose end was not observed."""
    return True


def worker_start(
    *,
    queue: str,
    figures: Mapping[str, Any],
    crashed: Callable[[Worker], bool] = _crashed,
) -> Worker:
    """Begin a worker's life as the only one of its queue, and recover from the last one.

    The last one's futures are pending again: with one attempt more if it crashed, which makes them
    suspects, else with one interruption more. A future that it ran alone fails if that is
    the third attempt, or the tenth interruption. Its locked doorbells are replaced by a fresh one.
    The worker returned holds the queue's lock until ``worker_stop`` or the end of the process.

    Args:
        queue: The queue whose futures it runs.
        figures: What it reports about itself.
        crashed: Called with a last worker that did not stop cleanly, even if it was marked lost
            already:
            False if it is known that the worker itself did not cause its end, so that its futures
            are no suspects.

    Raises:
        QueueTaken: Another live process serves the queue.
    """
    lock = QueueLock(queue)
    try:
        with transaction.atomic(using=alias()):
            last = Worker.objects.filter(queue=queue).order_by("-id").first()
            has_crashed = (
                last is not None and last.state != Worker.WorkerState.STOPPED and crashed(last)
            )
            _mark_lost(Worker.objects.filter(queue=queue))
            limit = MAX_ATTEMPTS if has_crashed else MAX_INTERRUPTIONS
            failed = execute(
                _TAKE_OVER,
                {
                    "queue": queue,
                    "crashed": has_crashed,
                    "max_attempts": MAX_ATTEMPTS,
                    "max_interruptions": MAX_INTERRUPTIONS,
                    "error": CRASHED % limit,
                },
            )
            notify_finished(request_id for (request_id,) in failed)
            worker = Worker.objects.create(
                queue=queue, hostname=socket.gethostname(), pid=os.getpid(), figures=dict(figures)
            )
            execute(
                """
                WITH old AS (DELETE FROM django_q_ormq WHERE key = %(queue)s)
                INSERT INTO django_q_ormq (key, payload, lock)
                VALUES (%(queue)s, %(doorbell)s, statement_timestamp())
                """,
                {"queue": queue, "doorbell": doorbell(queue)},
            )
            notify_bell(queue)
    except BaseException:
        lock.release()
        raise
    worker.queue_lock = lock
    return worker


def worker_mark_lost(*, queue: str, pid: int | None = None) -> bool:
    """Mark a queue's worker dead, for a caller that knows it before heartbeats are missed.

    Its futures stay unchanged until the next worker starts. The lock is the proof: while it
    is held, a worker lives, or the dead one's connection is not closed yet. Then nothing is marked
    and the answer is False; it is True if there is nothing left to mark.

    Args:
        queue: The queue of the worker.
        pid: Of the process on this machine that has ended; a worker with another pid is not marked.
            None:
            any worker that does not hold the lock.
    """
    dead = Worker.objects.filter(queue=queue, state__in=_OPEN)
    if pid is not None:
        dead = dead.filter(pid=pid, hostname=socket.gethostname())
    if not dead.exists():
        return True
    with transaction.atomic(using=alias()):
        # Until the commit, so that no worker starts meanwhile.
        [(is_free,)] = execute(
            "SELECT pg_try_advisory_xact_lock(hashtextextended('futures queue ' || %(queue)s, 0))",
            {"queue": queue},
        )
        if not is_free:
            return False
        _mark_lost(dead)
    return True


def worker_live(worker: Worker, figures: Mapping[str, Any]) -> None:
    """Record that the worker has loaded and takes work. Raises Fenced."""
    _beat(worker, figures, state=Worker.WorkerState.LIVE)


def worker_heartbeat(worker: Worker, figures: Mapping[str, Any]) -> None:
    """Record that the worker lives, and its figures.

    Raises:
        Fenced: It was replaced, or another worker has its queue's lock. It must end.
        OperationalError: Django's; Postgres does not answer, so it is unknown.
    """
    _beat(worker, figures)


def worker_stop(worker: Worker) -> None:
    """End the worker's life: its futures wait again, and the queue is free.

    Stopping is no crash, so it counts no attempt. Does nothing to the rows of a worker that
    was replaced, because another worker has its futures.
    """
    with transaction.atomic(using=alias()):
        stopped = Worker.objects.filter(pk=worker.pk, state__in=_OPEN).update(
            state=Worker.WorkerState.STOPPED, stopped_at=timezone.now()
        )
        if stopped:
            held = execute(
                "SELECT id FROM futures_future WHERE worker_id = %(id)s AND state = 'running'",
                {"id": worker.pk},
            )
            futures_release(worker=worker, request_ids=[request_id for (request_id,) in held])
    if worker.queue_lock is not None:
        worker.queue_lock.release()


def _mark_lost(workers: QuerySet[Worker]) -> None:
    workers.filter(state__in=_OPEN).update(state=Worker.WorkerState.LOST, stopped_at=timezone.now())


def _beat(worker: Worker, figures: Mapping[str, Any], **changes: Any) -> None:
    beaten = Worker.objects.filter(pk=worker.pk, state__in=_OPEN).update(
        heartbeat_at=timezone.now(), figures=dict(figures), **changes
    )
    if not beaten:
        raise Fenced
    if worker.queue_lock is not None:
        try:
            worker.queue_lock.renew()
        except QueueTaken:
            raise Fenced from None
