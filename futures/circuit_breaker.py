"""While Postgres is down, a few requests wait for it (one in each database thread) and who comes in
the second after is told at once.

A request that finds no Postgres waits a few seconds for it, which hides a restart. But a
process has few threads for its database; with every request waiting in turn, a hundredth
client would hear nothing for minutes. So whoever has waited in vain speaks for all who come
in the next moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from django.db import OperationalError

PATIENCE_SECONDS = 4.0
"""What a restarted Postgres needs to be back."""

LOOK_SECONDS = 0.1
BELIEVED_SECONDS = 1.0


class CircuitBreaker:
    """What one process knows about Postgres not answering; for all of its threads."""

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
        """``connect()``, again and again until it succeeds or the patience ends.

        Raises:
            OperationalError: Django's; in vain, or somebody has just waited in vain.
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
        """Somebody was answered: there is nothing to believe any more."""
        self._believed_until = 0.0


circuit_breaker = CircuitBreaker()
"""This process's."""
