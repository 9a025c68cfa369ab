"""Frees memory when a worker has been idle for a while.

A busy worker needs its memory again at once, so nothing happens here between two requests that
follow each other. The work is done in small steps, between which new requests are checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable

IDLE_SECONDS = 15.0
"""A client that pauses between two steps should not find a cold worker."""
AGAIN_SECONDS = 60.0
"""Time between two checks of a worker that stays idle: clients leave meanwhile."""


class IdleTime:
    """Detects an idle worker, and frees what nobody needs."""

    def __init__(
        self,
        *,
        let_go: Callable[[], bool],
        release_memory: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            let_go: Evicts one item; called until there is none.
            release_memory: Returns unused memory to the system; costs nothing if there
                is nothing.
        """
        self._let_go = let_go
        self._release_memory = release_memory
        self._clock = clock
        self._next_look = clock() + IDLE_SECONDS

    def worked(self) -> None:
        """Record that there was work until now."""
        self._next_look = self._clock() + IDLE_SECONDS

    def look(self) -> None:
        """Do one step, if the worker has been idle for long enough; to be
        called several times a second while there is no work."""
        if self._clock() < self._next_look:
            return
        if self._let_go():
            return
        self._next_look = self._clock() + AGAIN_SECONDS
        self._release_memory()
