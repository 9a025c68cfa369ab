"""While Postgres is down, one request in each database thread waits for it, and requests that
arrive in the second after that fail at once.

A request that finds Postgres down waits a few seconds for it, which hides a restart. But a
process has few database threads; if every request waited in turn, the hundredth client would get
no answer for minutes. So after one request has waited in vain, the requests of the next moment
fail without waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from django.db import OperationalError

PATIENCE_SECONDS = 4.0
"""Longer than a restart of Postgres takes."""

LOOK_SECONDS = 0.1
BELIEVED_SECONDS = 1.0


class CircuitBreaker:
    """Shared by all threads of a process: whether Postgres was down a moment ago."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._believed_until = 0.0

    def wait_out(self, connect: Callable[[], None]) -> None:
        """Call ``connect()`` until it succeeds or ``PATIENCE_SECONDS`` are over.

        Raises:
            OperationalError: Django's; Postgres is still down, or was down a moment ago.
        """
        if self._clock() < self._believed_until:
            raise OperationalError("Postgres did not answer a moment ago")
        deadline = self._clock() + PATIENCE_SECONDS
        while True:
            try:
                connect()
            except OperationalError:
                if self._clock() >= deadline:
                    self._believed_until = self._clock() + BELIEVED_SECONDS
                    raise
            else:
                return
            self._sleep(LOOK_SECONDS)

    def is_over(self) -> None:
        """Postgres has answered: close the circuit again."""
        self._believed_until = 0.0


circuit_breaker = CircuitBreaker()
"""This process's."""
