"""The life of a worker process, with an epoch that fences its commits.

Several workers may serve one queue; its lanes are leased to them (``futures.leases``). A lock
(``futures.worker_lock``) shows whether the process lives; the worker's row says whether its epoch
may still claim and commit. A worker that ends otherwise than by ``worker_stop`` is ended by others:
``futures.lost_workers``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from django.db import transaction
from django.utils import timezone

from futures.broker import doorbell
from futures.database import alias, execute
from futures.errors import Fenced, QueueTaken
from futures.finishing import futures_release
from futures.lost_workers import OPEN, Crashed, crash_assumed, lanes_free, workers_reap
from futures.models import Worker
from futures.notify import notify_bell
from futures.worker_lock import WorkerLock


def worker_start(
    *, queue: str, figures: Mapping[str, Any], crashed: Crashed = crash_assumed
) -> Worker:
    """Begin a worker's life, and end the lives of those of the queue that died on this machine.

    Their locked doorbells are replaced by a fresh one. The worker returned holds its
    lock until ``worker_stop`` or the end of the process.

    Args:
        queue: The queue whose futures it runs.
        figures: What it reports about itself.
        crashed: Judges each of the dead; see ``futures.lost_workers``.

    Raises:
        QueueTaken: A worker of the former version serves the queue.
    """
    [(epoch,)] = execute("SELECT nextval(pg_get_serial_sequence('futures_worker', 'id'))", {})
    lock = WorkerLock(queue, epoch)
    try:
        workers_reap(queue=queue, crashed=crashed)
        with transaction.atomic(using=alias()):
            worker = Worker.objects.create(
                pk=epoch,
                queue=queue,
                hostname=socket.gethostname(),
                pid=os.getpid(),
                figures=dict(figures),
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
    worker.lock = lock
    return worker


def worker_live(worker: Worker, figures: Mapping[str, Any]) -> None:
    """Record that the worker has loaded and takes work. Raises Fenced."""
    _beat(worker, figures, state=Worker.WorkerState.LIVE)


def worker_heartbeat(worker: Worker, figures: Mapping[str, Any]) -> None:
    """Record that the worker lives, and its figures.

    Raises:
        Fenced: Its life was ended, or another process has its lock. It must leave.
        OperationalError: Django's; Postgres does not answer, so it is unknown.
    """
    _beat(worker, figures)


def worker_stop(worker: Worker) -> None:
    """End the worker's life: its futures wait again, and its lanes are free.

    Stopping is no crash, so it counts no attempt. Does nothing to the rows of a worker whose life
    was ended, because others have its futures.
    """
    with transaction.atomic(using=alias()):
        stopped = Worker.objects.filter(pk=worker.pk, state__in=OPEN).update(
            state=Worker.WorkerState.STOPPED, stopped_at=timezone.now()
        )
        if stopped:
            held = execute(
                "SELECT id FROM futures_future WHERE worker_id = %(id)s AND state = 'running'",
                {"id": worker.pk},
            )
            futures_release(worker=worker, request_ids=[request_id for (request_id,) in held])
            lanes_free(worker)
            notify_bell(worker.queue)
    if worker.lock is not None:
        worker.lock.release()


def _beat(worker: Worker, figures: Mapping[str, Any], **changes: Any) -> None:
    beaten = Worker.objects.filter(pk=worker.pk, state__in=OPEN).update(
        heartbeat_at=timezone.now(), figures=dict(figures), **changes
    )
    if not beaten:
        raise Fenced
    if worker.lock is not None:
        try:
            worker.lock.renew()
        except QueueTaken:
            raise Fenced from None
