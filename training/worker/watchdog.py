"""The worker's sign of life, for a supervisor that cannot look inside.

A heartbeat from a thread proves that a thread lives. What can hang is the thread that works: in
a device call, in a lock, in a loop of the engine. So the sign is given by that thread, at every
turn of its loop and every layer of a pass, and is worth nothing else: a byte in a pipe, so that
no clock has to agree with another and no disk or database has to answer.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

EVERY_SECONDS = 0.2


class WatchdogSignal:
    """Call it whenever the work has got on; it is cheap enough for every layer."""

    def __init__(self, descriptor: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """``descriptor``: the pipe's end to write to; negative if nobody watches."""
        self._descriptor = descriptor
        self._clock = clock
        self._next = 0.0
        if descriptor >= 0:
            os.set_blocking(descriptor, False)
            os.set_inheritable(descriptor, False)

    def __call__(self) -> None:
        if self._descriptor < 0 or self._clock() < self._next:
            return
        self._next = self._clock() + EVERY_SECONDS
        # Full: the supervisor sleeps and has signs enough. Broken: it is gone, and we go too.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._descriptor, b".")
