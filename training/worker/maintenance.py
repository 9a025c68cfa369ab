"""What a worker does because time has passed, not because somebody asked.

Ages are differences between the wall clock and what was written down earlier, and a wall clock
can jump: a wrong clock is corrected, a machine sleeps, the server was off. After a jump forward
every silence looks long enough to end a session and every wait too long; and everybody's
silence looks long when it was the server that was away. So ages are believed only once the wall
clocks have kept step with a stopwatch for as long as a living client needs to show itself.
What a jump back does is delay, and where that could be for ever it is undone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from django.conf import settings

from futures.broker import doorbells_unlock
from futures.database import execute
from futures.lane_gaps import SETTLE_SECONDS, gaps_refuse
from training.services import checkpoints_expire
from training.services.recorded_samples import samples_forget
from training.services.sessions import sessions_expire

JUMP_SECONDS = 10.0
"""What two looks may differ by when nothing jumped: a slow statement, a clock being nudged."""


class SteadyClock:
    """Tells how long some wall clocks have kept step with a stopwatch."""

    def __init__(self, *, stopwatch: Callable[[], float] = time.monotonic) -> None:
        self._stopwatch = stopwatch
        self._offsets: tuple[float, ...] | None = None
        self._since = 0.0

    def steady_seconds(self, *wall_clocks: float) -> float:
        """How long none of them has jumped, as far as was looked; 0.0 the first time.

        Args:
            wall_clocks: What they say now, in seconds; the same ones each time.
        """
        now = self._stopwatch()
        before, self._offsets = self._offsets, tuple(wall - now for wall in wall_clocks)
        if before is None or any(
            abs(old - new) > JUMP_SECONDS for old, new in zip(before, self._offsets, strict=True)
        ):
            self._since = now
        return now - self._since


class Maintenance:
    """A queue's upkeep; ``do`` it every few seconds."""

    def __init__(
        self,
        queue: str,
        *,
        steady: SteadyClock | None = None,
        wall_clocks: Callable[[], tuple[float, ...]] | None = None,
    ) -> None:
        self._queue = queue
        self._steady = steady or SteadyClock()
        self._wall_clocks = wall_clocks or _wall_clocks

    def do(self) -> None:
        """Unlock doorbells that a clock set back has hidden. Then, once the clocks are steady,
        delete checkpoints and recorded samples whose time is up, finish sessions whose client is
        gone, and fail requests that wait for a number that does not come."""
        doorbells_unlock(self._queue)
        patience = settings.GAP_SECONDS
        if self._steady.steady_seconds(*self._wall_clocks()) >= max(SETTLE_SECONDS, patience):
            checkpoints_expire()
            samples_forget()
            sessions_expire()
            gaps_refuse(queue=self._queue, patience_seconds=patience)


def _wall_clocks() -> tuple[float, float]:
    """This machine's, and that of Postgres, which may be another's."""
    [(database,)] = execute("SELECT extract(epoch FROM clock_timestamp())::float8", {})
    return time.time(), float(database)
