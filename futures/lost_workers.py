"""The end of a worker that did not stop by itself: its futures wait again, and its lanes are free.

Nobody else may commit for a lane before that (``futures.leases``), and the worker itself cannot
afterwards, even if it was only thought dead: its epoch is over. So a wrong judgement costs
time, never a result. Three observers can know the end:

- the supervisor of its process, at once (``worker_ended``);
- a worker of the queue, or ``up``, that starts on the same machine and finds its process gone
  (``workers_reap``);
- any other live worker of the queue, after it has been silent for a while (``Colleagues``).

The first two also require that its lock is free: Postgres frees it when the process dies, however
it dies. The third requires that for a short silence. After a long one the process may be
stopped, or its machine cut off, and then its lock says nothing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import datetime

from django.db import transaction
from django.db.models import QuerySet
from django.utils import timezone

from futures.database import alias, execute
from futures.models import Worker
from futures.notify import notify_bell, notify_finished
from futures.worker_lock import is_held_here

OPEN = (Worker.WorkerState.STARTING, Worker.WorkerState.LIVE)
"""The states in which a worker may claim and commit."""

MAX_ATTEMPTS = 3
"""A future fails at this many crashes of workers that ran it, if it ran alone at the last one."""

MAX_INTERRUPTIONS = 10
"""The same for workers that were ended from outside. The cause is probably not the future, but a
future that ends the whole machine each time looks the same, and must not be repeated forever."""

CRASHED = "This request stopped the worker %d times, so it is not tried again."

SILENT_SECONDS = 30.0
"""After this long without a heartbeat a worker is lost, even if its lock is held."""

SILENT_UNLOCKED_SECONDS = 12.0
"""The same if its lock is free; a worker that lost only its connection has its lock again at its
next heartbeat."""

PATIENCE_SECONDS = 5.0
"""How long a start waits until Postgres has noticed that a dead process's connection is closed."""

LOOK_SECONDS = 0.02
"""Seconds between two such checks."""

LONGEST_LOOK_SECONDS = 10.0
"""Largest silence counted between two looks: this process may have been paused as well."""

Crashed = Callable[[Worker], bool]
"""Whether a worker may have ended because of its work: False if it is known that it did not, so
that its futures are no suspects."""

# Nothing that the epoch holds is visible yet: all of it waits again, except
# futures that have stopped too many workers. A crash with many running futures does not show the
# cause, so it makes them suspects, which run alone; only one that ran alone is failed.
_GIVE_BACK = """
WITH held AS (
    SELECT id, count(*) OVER () = 1 AS was_alone,
        attempts + %(crashed)s::int AS attempts,
        interruptions + (NOT %(crashed)s)::int AS interruptions
    FROM futures_future
    WHERE state = 'running' AND worker_id = %(worker_id)s
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

_FREE = "UPDATE futures_lane SET worker_id = NULL WHERE worker_id = %(worker_id)s"

# Until the end of the transaction.
_TRY_LOCK = """
SELECT pg_try_advisory_xact_lock(hashtextextended('futures worker ' || %(epoch)s::text, 0))
"""

# Those of the version before leases: marked lost, with futures that they left to the next worker,
# or with futures in lanes that nobody leases.
_FORMER_VERSION = """
SELECT DISTINCT f.worker_id
FROM futures_future AS f
JOIN futures_worker AS w ON w.id = f.worker_id
LEFT JOIN futures_lane AS l ON l.id = f.lane_id
WHERE f.queue = %(queue)s AND f.state = 'running'
    AND (w.state IN ('stopped', 'lost') OR (l.ordered AND l.worker_id IS NULL))
"""


def crash_assumed(worker: Worker) -> bool:
    """The assumption about a worker whose end was not observed."""
    return True


def worker_ended(*, queue: str, pid: int, crashed: Crashed) -> bool:
    """End the life of the queue's worker in a process of this machine that has ended.

    Returns:
        Whether nothing is left to end: False while its lock is held, because Postgres needs a
        moment to notice that a dead process's connection is closed.
    """
    left = False
    for worker in _open(queue).filter(pid=pid, hostname=socket.gethostname()):
        left = not worker_reap(worker, crashed=crashed) or left
    return not left


def workers_reap(*, queue: str, crashed: Crashed) -> None:
    """End the lives of the queue's workers that this machine knows to be dead.

    Those of a process that does not exist here any more; also those of the version before leases,
    which never serve a queue at the same time as others (``futures.worker_lock``).
    """
    former = [epoch for (epoch,) in execute(_FORMER_VERSION, {"queue": queue})]
    for worker in _open(queue) | Worker.objects.filter(pk__in=former):
        if worker.pk in former or _has_ended_here(worker):
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not worker_reap(worker, crashed=crashed) and time.monotonic() < deadline:
                time.sleep(LOOK_SECONDS)


def worker_reap(worker: Worker, *, crashed: Crashed, must_be_unlocked: bool = True) -> bool:
    """End a worker's life: in one transaction it is lost, its futures wait again and its lanes are
    free.

    The futures have one attempt more if it crashed, which makes them suspects, else one
    interruption more. A future that it ran alone fails if that is the third attempt, or
    the tenth interruption.

    Args:
        must_be_unlocked: Do nothing while its lock is held.

    Returns:
        Whether its life is over.
    """
    has_crashed = crashed(worker)
    with transaction.atomic(using=alias()):
        if must_be_unlocked:
            [(is_free,)] = execute(_TRY_LOCK, {"epoch": worker.pk})
            if not is_free:
                return False
        # Waits for a claim of this worker, and a claim that waits for this finds no epoch.
        Worker.objects.filter(pk=worker.pk, state__in=OPEN).update(
            state=Worker.WorkerState.LOST, stopped_at=timezone.now()
        )
        failed = execute(
            _GIVE_BACK,
            {
                "worker_id": worker.pk,
                "crashed": has_crashed,
                "max_attempts": MAX_ATTEMPTS,
                "max_interruptions": MAX_INTERRUPTIONS,
                "error": CRASHED % (MAX_ATTEMPTS if has_crashed else MAX_INTERRUPTIONS),
            },
        )
        lanes_free(worker)
        notify_finished(request_id for (request_id,) in failed)
        notify_bell(worker.queue)
    return True


def lanes_free(worker: Worker) -> None:
    """Free all lanes of a worker whose life ends in the caller's transaction."""
    execute(_FREE, {"worker_id": worker.pk})


class Colleagues:
    """One worker's observation of the others of its queue; ``look`` at them every few seconds.

    A silence is measured by this process's own clock, from look to look, so it does not matter if a
    wall clock jumps or differs from another machine's.
    """

    def __init__(
        self, worker: Worker, *, crashed: Crashed, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._worker = worker
        self._crashed = crashed
        self._clock = clock
        self._looked_at = clock()
        self._heard: dict[int, tuple[datetime, float]] = {}
        """Epoch to its last heartbeat and the seconds of silence since."""

    def look(self) -> list[int]:
        """End the lives of those that have been silent for too long; return their epochs."""
        now = self._clock()
        passed = min(now - self._looked_at, LONGEST_LOOK_SECONDS)
        self._looked_at = now
        heard: dict[int, tuple[datetime, float]] = {}
        ended: list[int] = []
        for other in _open(self._worker.queue).exclude(pk=self._worker.pk):
            last, silent = self._heard.get(other.pk, (None, 0.0))
            silent = silent + passed if last == other.heartbeat_at else 0.0
            heard[other.pk] = (other.heartbeat_at, silent)
            if silent >= SILENT_UNLOCKED_SECONDS and worker_reap(
                other, crashed=self._crashed, must_be_unlocked=silent < SILENT_SECONDS
            ):
                ended.append(other.pk)
        self._heard = heard
        return ended


def _open(queue: str) -> QuerySet[Worker]:
    return Worker.objects.filter(queue=queue, state__in=OPEN)


def _has_ended_here(worker: Worker) -> bool:
    """Whether the worker was a process of this machine that does not exist any more.

    The number of a process may be used again, so the row of this process's number may be that of
    another one.
    """
    if worker.hostname != socket.gethostname():
        return False
    if worker.pid == os.getpid():
        return not is_held_here(worker.pk)
    try:
        os.kill(worker.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
