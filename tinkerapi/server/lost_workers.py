"""Ends a worker's life in the database as soon as the parent process knows that it has ended.

Others can then do its work at once. Without it a killed worker looks alive until its successor
starts or its heartbeats are missed. The supervisor must not wait for Postgres, which may be down
too, so a thread does it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from django.db import DatabaseError, InterfaceError, connection

from futures.lost_workers import worker_ended
from training.worker.crash_log import crashed

TRY_SECONDS = 15.0  # after this, its successor has done it, or its heartbeats are missed anyway
LOOK_SECONDS = 0.1  # Postgres needs a moment to notice that the dead worker's connection is closed


def report_worker_end(queue: str) -> Callable[[int], None]:
    """For the supervisor of a queue's worker: ends the life of the worker of a process that has
    ended."""

    def report(pid: int) -> None:
        threading.Thread(
            target=_mark, args=(queue, pid), name=f"end of {queue}", daemon=True
        ).start()

    return report


def _mark(queue: str, pid: int) -> None:
    deadline = time.monotonic() + TRY_SECONDS
    try:
        while time.monotonic() < deadline:
            try:
                if worker_ended(queue=queue, pid=pid, crashed=crashed):
                    return
            except (DatabaseError, InterfaceError):
                connection.close()
            time.sleep(LOOK_SECONDS)
    finally:
        connection.close()
