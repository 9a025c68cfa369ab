"""How many cores a worker may use now: those that other processes leave idle.

Two workers on one machine, or a worker and a person's own program, would otherwise wait for each
other in every operation. Web and Postgres need a core for moments only, and have priority over the
threads beside the worker's own.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from training.devices import count_cores, own_cores
from training.engine.interface import Trainer

LOOK_SECONDS = 0.5
"""Between two measurements; a shorter time would measure the clock's ticks."""

HOPE_SECONDS = 0.02
"""Between two looks at what runs at one moment."""

STAT = Path("/proc/stat")
LOADAVG = Path("/proc/loadavg")
IDLE_FIELDS = (3, 4)
"""Of a core's line: idle, and idle while it waits for a disk."""


class IdleCores:
    """Measures the load of this process's cores by others.

    What others took in the last half second says little of now if they have just ended, such as a
    client that computes between its requests. So if nothing else runs at one moment, their cores
    are taken at once; if that was wrong, not again before a measurement finds them idle.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        own_seconds: Callable[[], float] = time.process_time,
        busy_seconds: Callable[[], float | None] | None = None,
        num_running: Callable[[], int | None] | None = None,
        num_cores: int | None = None,
    ) -> None:
        """
        Args:
            own_seconds: CPU time of this process.
            busy_seconds: CPU time of all processes on these cores; None where the system does not
                report it.
            num_running: Threads that run or could run at this moment, the calling one included;
                likewise.
            num_cores: Those that this process may use at most.
        """
        self._clock = clock
        self._own_seconds = own_seconds
        self._busy_seconds = busy_seconds or seconds_busy
        self._num_running = num_running or threads_running
        self.most = num_cores or count_cores()
        self._last = self._now()
        self._count = self.most
        self._hoped = 0
        """The number that was taken without a measurement, and not confirmed yet; 0: none."""
        self._hoped_at = -math.inf

    def look(self) -> int | None:
        """The number of threads to use from now on; None soon after the last measurement."""
        if self._clock() - self._last[0] < LOOK_SECONDS:
            return self._hope()
        before, self._last = self._last, self._now()
        (start, own_before, busy_before), (end, own, busy) = before, self._last
        if busy is None or busy_before is None:
            self._count = max(1, self.most - 1)
            return self._count
        others = (busy - busy_before - (own - own_before)) / (end - start)
        self._count = max(1, min(self.most, math.floor(self.most - others + 0.5)))
        if self._count >= self._hoped:
            self._hoped = 0
        return self._count

    def _hope(self) -> int | None:
        """More threads than were measured, if so many cores have nothing to do now."""
        now = self._clock()
        if self._hoped or self._count == self.most or now - self._hoped_at < HOPE_SECONDS:
            return None
        self._hoped_at = now
        running = self._num_running()
        if running is None or self.most - (running - 1) <= self._count:
            return None
        self._count = self._hoped = self.most - (running - 1)
        self._last = self._now()
        return self._count

    def _now(self) -> tuple[float, float, float | None]:
        return self._clock(), self._own_seconds(), self._busy_seconds()


class UseIdleCores:
    """Makes a trainer and its sampler compute with as many threads as there are idle cores.

    Call it at every sign of progress: a long pass must not wait in each layer for a thread whose
    core another process has begun to use.
    """

    def __init__(self, trainer: Trainer, idle: IdleCores, *, then: Callable[[], None]) -> None:
        """``then``: is called too."""
        self._trainer = trainer
        self._idle = idle
        self._then = then

    def __call__(self) -> None:
        self._then()
        count = self._idle.look()
        if count is not None:
            self._trainer.use_threads(count)


def seconds_busy(stat: Path = STAT) -> float | None:
    """The CPU time of all processes on the cores that this one may run on; None if the system does
    not report it."""
    names = {f"cpu{core}" for core in own_cores()}
    try:
        lines = [line.split() for line in stat.read_text().splitlines() if line[:3] == "cpu"]
    except OSError:
        return None
    ticks = 0
    for name, *fields in lines:
        if name in names:
            # Time of guests is part of the first two fields.
            ticks += sum(int(f) for i, f in enumerate(fields[:8]) if i not in IDLE_FIELDS)
    return ticks / os.sysconf("SC_CLK_TCK")


def threads_running(loadavg: Path = LOADAVG) -> int | None:
    """The threads of the machine that run or wait for a core; None if the system does not report
    it."""
    try:
        return int(loadavg.read_text().split()[3].split("/")[0])
    except OSError:
        return None
