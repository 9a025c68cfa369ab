"""The worker's progress signal to its supervisor.

A heartbeat from a thread only proves that this thread lives. The working thread can hang: in
a device call, a lock, or a loop of the engine. So that thread gives the signal, at every
turn of its loop and every layer of a pass. It is a byte in a pipe, so
no two clocks have to agree and no disk or database has to answer.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

EVERY_SECONDS = 0.2


class WatchdogSignal:
    """Call it whenever the work makes progress; it is cheap enough for every layer."""

    def __init__(self, descriptor: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """``descriptor``: the pipe's end to write to; negative without a supervisor."""
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
        # Full: the supervisor has enough signals. Broken: it has ended, and this process ends too.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._descriptor, b".")
