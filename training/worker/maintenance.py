"""Time-based tasks of a worker, independent of requests.

Ages are differences between the wall clock and stored times, and a wall clock
can jump: it is corrected, the machine sleeps, the server was off. After a jump forward
every session seems silent and every wait too long; and all clients seem
silent if the server itself was down. So ages are used only once the wall
clocks have agreed with a monotonic clock for as long as a live client needs to show itself.
A jump back causes delay; where the delay could be unlimited, it is undone.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from django.conf import settings

from futures.broker import doorbells_unlock
from futures.database import execute
from futures.lane_gaps import SETTLE_SECONDS, gaps_refuse
from training.request_hours import hours_count
from training.services import checkpoints_expire
from training.services.recorded_samples import samples_forget
from training.services.rollouts import rollouts_forget
from training.services.sessions import sessions_expire
from training.services.thinning import checkpoints_thin

JUMP_SECONDS = 10.0
"""Allowed difference between two checks without a jump: a slow statement, a small clock
correction."""


class SteadyClock:
    """Measures for how long some wall clocks have agreed with a monotonic clock."""

    def __init__(self, *, stopwatch: Callable[[], float] = time.monotonic) -> None:
        self._stopwatch = stopwatch
        self._offsets: tuple[float, ...] | None = None
        self._since = 0.0

    def steady_seconds(self, *wall_clocks: float) -> float:
        """For how long none of them has jumped, as observed by these calls; 0.0 the first time.

        Args:
            wall_clocks: Their current times in seconds; the same clocks each time.
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
        """Unlock doorbells hidden by a clock that was set back. Then, once the clocks are steady,
        delete expired checkpoints, those that newer ones replace (if a setting says so), recorded
        samples and old rollouts, finish sessions whose
        client is gone, fail requests that wait for a number that does not arrive, and count the
        requests of hours that are over."""
        doorbells_unlock(self._queue)
        patience = settings.GAP_SECONDS
        if self._steady.steady_seconds(*self._wall_clocks()) >= max(SETTLE_SECONDS, patience):
            checkpoints_expire()
            checkpoints_thin()
            samples_forget()
            rollouts_forget()
            sessions_expire()
            gaps_refuse(queue=self._queue, patience_seconds=patience)
            hours_count()


def _wall_clocks() -> tuple[float, float]:
    """This machine's clock, and that of Postgres, which may run on another one."""
    [(database,)] = execute("SELECT extract(epoch FROM clock_timestamp())::float8", {})
    return time.time(), float(database)
