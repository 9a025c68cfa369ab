"""A command that ``up`` runs again and again, some hours apart, beside its parts.

The time of the last run that succeeded is that of a file in the data folder, so a restart neither
repeats nor skips one. A clock that was set wrong must not start it, because commands like
``prunefutures`` delete by age: it waits until the wall clock has agreed with a monotonic
clock for ten minutes.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tinkerapi.server.log_file import log_rotate
from training.parent_death import parent_death_prefix
from training.worker.maintenance import SteadyClock

STEADY_SECONDS = 600.0
RETRY_SECONDS = 3600.0
"""After a failure; its successor may succeed, for instance once Postgres is up again."""
STOP_SECONDS = 5.0


@dataclass
class RepeatedCommand:
    """Call ``tick`` often, from one thread, and ``stop`` at the end."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    """Its output, also that of earlier runs."""
    stamp: Path
    """The file whose time is that of the last run that succeeded."""
    every_seconds: float
    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._steady = SteadyClock(stopwatch=self.clock)
        self._not_before = 0.0

    def tick(self) -> None:
        """Start the command if it is due; notice its end."""
        steady_seconds = self._steady.steady_seconds(self.wall_clock())
        if self.process is not None:
            self._notice_end(self.process)
        elif steady_seconds >= STEADY_SECONDS and self._is_due():
            try:
                self._start()
            except OSError as error:  # a full disk, for example, must not end the server
                self._plan_retry(f"did not start: {error}")

    def stop(self) -> None:
        """End it; whatever it has not done, the next run does."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def _is_due(self) -> bool:
        if self.clock() < self._not_before:
            return False
        try:
            last = self.stamp.stat().st_mtime
        except FileNotFoundError:
            return True
        # A stamp of the future was written under a clock that was wrong.
        return not 0 <= self.wall_clock() - last < self.every_seconds

    def _start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        log_rotate(self.log)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603
                [*parent_death_prefix("TERM"), *self.command],
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )

    def _notice_end(self, process: subprocess.Popen[bytes]) -> None:
        status = process.poll()
        if status is None:
            return
        self.process = None
        if status == 0:
            try:
                self.stamp.touch()
            except OSError as error:
                self._plan_retry(f"cannot note its time: {error}")
            return
        self._plan_retry(f"ended with exit code {status}; {self.log} says why")

    def _plan_retry(self, what: str) -> None:
        self._not_before = self.clock() + RETRY_SECONDS
        self.say(f"{self.name} {what}; trying again in {RETRY_SECONDS / 60:g} minutes")
