"""What a worker does once it has had nothing to do for a while: it gives memory back.

What a busy worker keeps, it needs again at once, so nothing here happens between two requests that
follow each other. What is done is done in small pieces, between which new work is looked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable

IDLE_SECONDS = 15.0
"""A client that thinks between two steps should not find its worker cold."""
AGAIN_SECONDS = 60.0
"""Between two looks of a worker that stays idle: clients leave meanwhile."""


class IdleTime:
    """Notices that a worker is idle, and has it let go of what nobody needs."""

    def __init__(
        self,
        *,
        let_go: Callable[[], bool],
        release_memory: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            let_go: Lets go of one thing; called until it says that there was none.
            release_memory: Gives the system what nothing uses any more; costs nothing when there
                is nothing.
        """
        self._let_go = let_go
        self._release_memory = release_memory
        self._clock = clock
        self._next_look = clock() + IDLE_SECONDS

    def worked(self) -> None:
        """Say that there was work until now."""
        self._next_look = self._clock() + IDLE_SECONDS

    def look(self) -> None:
        """Do one piece of what there is to do, if the worker has been idle for long enough; to be
        called several times a second while there is no work."""
        if self._clock() < self._next_look:
            return
        if self._let_go():
            return
        self._next_look = self._clock() + AGAIN_SECONDS
        self._release_memory()
