"""The lock that a worker holds while it lives."""

from __future__ import annotations

from typing import Any

import psycopg
from django.db import OperationalError

from futures.database import dedicated_parameters
from futures.errors import QueueTaken

_PATIENCE_SECONDS = 5.0
"""How long a start waits for a worker of the former version that is just ending."""

# Postgres ends the session of a machine that has vanished, and frees the lock, within a minute.
_SETTINGS = """
SELECT set_config('lock_timeout', %s, false), set_config('tcp_keepalives_idle', '20', false),
    set_config('tcp_keepalives_interval', '10', false),
    set_config('tcp_keepalives_count', '3', false)
"""


_held_here: set[int] = set()


def is_held_here(epoch: int) -> bool:
    """Whether a worker of this epoch lives in this process."""
    return epoch in _held_here


class WorkerLock:
    """Two session-level advisory locks, on a connection kept for them alone.

    One is this worker's own; while it is held, the process lives. The other is shared by all
    workers of the queue. The version before leases allowed one worker per queue, which took that
    lock for itself: so workers of the two versions never serve a queue at the same time. Postgres
    frees both when this process ends; if only the connection is lost, ``renew`` takes them again.
    """

    def __init__(self, queue: str, epoch: int) -> None:
        """Raises QueueTaken if a worker of the former version serves the queue."""
        self._queue = queue
        self._epoch = epoch
        self._connection = self._take()
        _held_here.add(epoch)

    def renew(self) -> None:
        """Make sure the locks are held.

        Raises:
            QueueTaken: The connection was lost, and another process has taken one of them since.
            OperationalError: Django's; Postgres cannot be reached, so it is unknown.
        """
        try:
            try:
                self._connection.execute("SELECT")
            except psycopg.OperationalError:
                self._connection.close()
                self._connection = self._take()
        except psycopg.OperationalError as error:
            raise OperationalError(str(error)) from error

    @property
    def is_held(self) -> bool:
        """Whether this process still holds it, as far as this process knows."""
        return not self._connection.closed

    def release(self) -> None:
        _held_here.discard(self._epoch)
        self._connection.close()

    def _take(self) -> psycopg.Connection[Any]:
        connection = psycopg.connect(**dedicated_parameters())
        try:
            connection.execute(_SETTINGS, [f"{_PATIENCE_SECONDS * 1000:.0f}"])
            connection.execute(
                "SELECT pg_advisory_lock_shared(hashtextextended('futures queue ' || %s, 0))",
                [self._queue],
            )
            connection.execute(
                "SELECT pg_advisory_lock(hashtextextended('futures worker ' || %s::text, 0))",
                [self._epoch],
            )
        except BaseException as error:
            connection.close()
            if isinstance(error, psycopg.errors.LockNotAvailable):
                raise QueueTaken from None
            raise
        return connection
