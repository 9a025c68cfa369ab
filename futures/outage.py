"""While Postgres is down, one request finds out and the others are told at once.

A request that needs a connection waits a few seconds for one, which hides a restart. But a
process has few threads for its database; with every request waiting in turn, a hundredth
client would hear nothing for minutes. So whoever has waited in vain speaks for all who come
in the next moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from django.db import OperationalError
from psycopg_pool import PoolTimeout

T = TypeVar("T")

BELIEVED_SECONDS = 1.0


class Outage:
    """What one process knows about Postgres not answering; for all of its threads."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._believed_until = 0.0

    def check(self) -> None:
        """To be asked before something that needs a connection.

        Raises:
            OperationalError: Django's; somebody has just waited for one in vain.
        """
        if self._clock() < self._believed_until:
            raise OperationalError("Postgres did not answer a moment ago")

    def noting(self, question: Callable[..., T], *args: object) -> T:
        """``question(*args)``; when it waits for a connection in vain, ``check`` will know."""
        try:
            return question(*args)
        except OperationalError as error:
            if isinstance(error.__cause__, PoolTimeout):
                self._believed_until = self._clock() + BELIEVED_SECONDS
            raise


outage = Outage()
"""This process's."""
