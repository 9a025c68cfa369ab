"""A worker's throughput: futures finished per second of work, over its last minute."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_SECONDS = 60.0
MAX_BATCHES = 1000


class Throughput:
    """Counts finished futures and their time; time without work does not count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._batches: deque[tuple[int, float]] = deque(maxlen=MAX_BATCHES)
        """Finished futures, and seconds since the previous commit or since work began."""
        self._since = clock()

    def work_begins(self) -> None:
        """Record the start of work after idle time."""
        self._since = self._clock()

    def finished(self, count: int) -> None:
        """Record the number of futures committed."""
        now = self._clock()
        self._batches.append((count, now - self._since))
        self._since = now
        seconds = sum(batch[1] for batch in self._batches)
        while len(self._batches) > 1 and seconds > WINDOW_SECONDS:
            seconds -= self._batches.popleft()[1]

    @property
    def futures_per_second(self) -> float | None:
        """None until a future was finished."""
        count = sum(batch[0] for batch in self._batches)
        seconds = sum(batch[1] for batch in self._batches)
        return count / seconds if count and seconds > 0 else None
