"""How fast a worker gets on: futures finished per second of work, over the last minute of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_SECONDS = 60.0
MAX_BATCHES = 1000


class Throughput:
    """Counts what is finished and the time it took; time without work does not count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._batches: deque[tuple[int, float]] = deque(maxlen=MAX_BATCHES)
        """Futures finished, and seconds since the commit before or since work began."""
        self._since = clock()

    def work_begins(self) -> None:
        """After a time without work."""
        self._since = self._clock()

    def finished(self, count: int) -> None:
        """So many futures were committed."""
        now = self._clock()
        self._batches.append((count, now - self._since))
        self._since = now
        seconds = sum(batch[1] for batch in self._batches)
        while len(self._batches) > 1 and seconds > WINDOW_SECONDS:
            seconds -= self._batches.popleft()[1]

    @property
    def futures_per_second(self) -> float | None:
        """None until something was finished."""
        count = sum(batch[0] for batch in self._batches)
        seconds = sum(batch[1] for batch in self._batches)
        return count / seconds if count and seconds > 0 else None
