"""The lock that a worker holds on its queue while it lives."""

from __future__ import annotations

from typing import Any

import psycopg
from django.db import OperationalError

from futures.database import dedicated_parameters
from futures.errors import QueueTaken

_PATIENCE_SECONDS = 5.0
"""How long a start waits for the lock of a predecessor that is just ending."""


class QueueLock:
    """A session-level advisory lock on a queue, on a connection kept for it alone.

    Raises QueueTaken if another process holds it. Postgres frees it when this process
    ends; if only the connection is lost, ``renew`` takes it again.
    """

    def __init__(self, queue: str) -> None:
        self._queue = queue
        self._connection = self._take(_PATIENCE_SECONDS)

    def renew(self) -> None:
        """Make sure the lock is held.

        Raises:
            QueueTaken: The connection was lost and another worker has taken the lock since.
            OperationalError: Django's; Postgres cannot be reached, so it is unknown.
        """
        try:
            try:
                self._connection.execute("SELECT")
            except psycopg.OperationalError:
                self._connection.close()
                self._connection = self._take(_PATIENCE_SECONDS)
        except psycopg.OperationalError as error:
            raise OperationalError(str(error)) from error

    @property
    def is_held(self) -> bool:
        """Whether this process still holds it, as far as this process knows."""
        return not self._connection.closed

    def release(self) -> None:
        self._connection.close()

    def _take(self, patience_seconds: float) -> psycopg.Connection[Any]:
        connection = psycopg.connect(**dedicated_parameters())
        try:
            connection.execute(
                "SELECT set_config('lock_timeout', %s, false)", [f"{patience_seconds * 1000:.0f}"]
            )
            connection.execute(
                "SELECT pg_advisory_lock(hashtextextended('futures queue ' || %s, 0))",
                [self._queue],
            )
        except BaseException as error:
            connection.close()
            if isinstance(error, psycopg.errors.LockNotAvailable):
                raise QueueTaken from None
            raise
        return connection
