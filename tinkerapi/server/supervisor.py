"""Keeps a handful of processes running: starts them in order, again when they die, stops them.

It does not know what they do. Everything runs in the main thread, because the signal that
ends a child after its parent was killed is tied to the thread that forked it. A child gets its
own process group, so that Ctrl+C in the terminal reaches only the supervisor, which stops the
parts in order, and so that the children of a killed child can be removed with it.

A child can hang as well as die. One with a ``Watch`` writes to a pipe whenever it makes progress;
if the pipe is silent for too long by this process's clock, the child is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tinkerapi.server.log_file import log_rotate
from training.parent_death import parent_death_prefix

FIRST_DELAY_SECONDS = 0.5
MAX_DELAY_SECONDS = 30.0
STEADY_SECONDS = 60.0  # a part that ran this long is restarted without back-off
LONGEST_LOOK_SECONDS = 5.0  # largest silence counted between two checks
LAST_WORDS_SECONDS = 2.0  # for a hung child to write its stack traces before it is killed


class Refused(Exception):
    """A part cannot start, and says why in one sentence; another try is useless."""


class Part(Protocol):
    """A part that the supervisor keeps running."""

    name: str
    stop_rank: int
    """Parts of a lower rank are stopped first, parts of the same rank together."""

    def start(self) -> None:
        """Start it; raises an exception with one sentence if that is impossible."""

    def ended(self) -> str | None:
        """None while it runs, otherwise how it ended, as part of a sentence.

        Raises:
            Refused: It ended because it can never start.
        """

    def ask_to_stop(self) -> None:
        """Tell it to end, and return at once."""

    def stop(self, hurry: Callable[[], bool]) -> None:
        """Wait for the requested end; kill it once ``hurry()`` returns True."""


@dataclass
class Watch:
    """Detects a hung child: one that makes progress writes to a pipe."""

    variable: str
    """Environment variable in which the child finds the pipe's descriptor."""
    silence_seconds: float
    """The longest time without a write."""
    clock: Callable[[], float] = time.monotonic
    reader: int | None = field(default=None, init=False)
    looked_at: float = field(default=0.0, init=False)
    silent: float = field(default=0.0, init=False)

    def open(self) -> int:
        """Make a new pipe; returns the descriptor for the child, to be closed in this process."""
        self.close()
        self.reader, writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.looked_at, self.silent = self.clock(), 0.0
        return writer

    def close(self) -> None:
        if self.reader is not None:
            os.close(self.reader)
            self.reader = None

    def silent_seconds(self) -> float:
        """The seconds without a write that this process has observed; call it often.

        After a late call (the machine was paused, or there was other work) the time in between is
        unknown, because the child may have been paused as well.
        """
        now = self.clock()
        self.silent += min(now - self.looked_at, LONGEST_LOOK_SECONDS)
        self.looked_at = now
        if self.reader is not None and _drained(self.reader):
            self.silent = 0.0
        return self.silent


def _drained(reader: int) -> bool:
    """Whether there was anything to read."""
    try:
        return bool(os.read(reader, 65536))
    except BlockingIOError:
        return False


@dataclass
class Child:
    """A part that is a command; its output goes to a log file."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    stop_seconds: float
    """How long it may take to end before it is killed."""
    parent_death_signal: str
    """Its signal when the supervisor is killed: KILL, or TERM if it has children to stop."""
    stop_rank: int
    watch: Watch | None = None
    """None: it is not checked for progress."""
    refusal_status: int | None = None
    """Exit code that means that it can never start; its last line says why."""
    on_end: Callable[[int], None] = lambda pid: None
    """Called with the number of a process that has ended unexpectedly; must not block."""
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    hung: bool = field(default=False, init=False)
    log_start: int = field(default=0, init=False)

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        log_rotate(self.log)
        self.hung = False
        environment = dict(self.environment)
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(self.log.open("ab"))
            self.log_start = log.tell()
            pipes: tuple[int, ...] = ()
            if self.watch is not None:
                pipes = (self.watch.open(),)
                stack.callback(os.close, pipes[0])
                environment[self.watch.variable] = str(pipes[0])
            self.process = subprocess.Popen(  # noqa: S603
                [*parent_death_prefix(self.parent_death_signal), *self.command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=pipes,
                process_group=0,
            )

    def ended(self) -> str | None:
        if self.process is None:
            return "was not started"
        status = self.process.poll()
        if status is None:
            self._end_if_hung(self.process)
            if log_rotate(self.log):
                self.log_start = 0
            return None
        # A killed server leaves its own children, which hold the port.
        self._kill_group(self.process)
        self.on_end(self.process.pid)
        self.process = None
        if self.hung and self.watch is not None:
            return f"made no progress for {self.watch.silence_seconds:g} s and was killed"
        if status < 0:
            return f"was ended by {signal.Signals(-status).name}"
        if status == self.refusal_status:
            raise Refused(self.crash_log(limit=2000))
        words = self.crash_log()
        return f"ended with exit code {status}" + (f": {words}" if words else "")

    def _end_if_hung(self, process: subprocess.Popen[bytes]) -> None:
        """Make a silent child write its stack traces and end (ABRT); kill it if it does not."""
        if self.watch is None:
            return
        excess = self.watch.silent_seconds() - self.watch.silence_seconds
        if excess > 0 and not self.hung:
            self.hung = True
            process.send_signal(signal.SIGABRT)
        elif self.hung and excess > LAST_WORDS_SECONDS:
            process.kill()

    def ask_to_stop(self) -> None:
        if self.process is not None:
            self.process.terminate()

    def stop(self, hurry: Callable[[], bool]) -> None:
        process, self.process = self.process, None
        if self.watch is not None:
            self.watch.close()
        if process is None:
            return
        deadline = time.monotonic() + self.stop_seconds
        while process.poll() is None and time.monotonic() < deadline and not hurry():
            time.sleep(0.02)
        self._kill_group(process)
        process.wait()

    def crash_log(self, *, limit: int = 300) -> str:
        """The last line it has printed since its start; of a progress bar, the last state."""
        with self.log.open("rb") as log:
            log.seek(max(self.log_start, self.log.stat().st_size - 4096))
            lines = log.read().decode(errors="replace").splitlines()  # at \r too
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:limit]

    @staticmethod
    def _kill_group(process: subprocess.Popen[bytes]) -> None:
        """Kill the rest of the group. Call it only right after the leader has ended,
        before its process number can be reused."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # none is left
            os.killpg(process.pid, signal.SIGKILL)


@dataclass
class _Watched:
    part: Part
    started_at: float
    failures: int = 0
    start_at: float | None = None
    """When to start it again; None while it runs."""


class Supervisor:
    """Runs parts; ``tick`` often, ``stop`` at the end."""

    def __init__(
        self,
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        max_delay_seconds: float = MAX_DELAY_SECONDS,
    ) -> None:
        """``max_delay_seconds``: the longest wait of a part that keeps ending."""
        self.say = say
        self.clock = clock
        self.max_delay_seconds = max_delay_seconds
        self.has_been_ready = False
        """Set once all parts work. From then on a refusal counts as a failure and is retried,
        because a change under a running server may be corrected."""
        self.restarts = 0
        """How often a part ended by itself, or failed to start, and was given another try."""
        self._watched: list[_Watched] = []

    def add(self, part: Part) -> None:
        """Start a part and keep it running from now on.

        Raises:
            Exception: The exception of ``part.start``; the first start is not repeated.
        """
        # Registered before it is started: a signal during the start must not leave it behind.
        self._watched.append(_Watched(part, self.clock()))
        part.start()

    def tick(self) -> None:
        """Notice ended parts, and restart those that have waited long enough.

        Raises:
            Refused: A part can never start, and the server has not been ready yet.
        """
        for watched in self._watched:
            now = self.clock()
            if watched.start_at is None:
                how = self._how_it_ended(watched.part)
                if how is not None:
                    self._plan_restart(watched, how)
            elif now >= watched.start_at:
                watched.start_at = None
                watched.started_at = now
                try:
                    watched.part.start()
                except Exception as error:
                    self._plan_restart(watched, f"did not start: {error}")

    def stop(self, hurry: Callable[[], bool]) -> None:
        """Stop all parts, rank by rank."""
        parts, self._watched = [watched.part for watched in self._watched], []
        for rank in sorted({part.stop_rank for part in parts}):
            together = [part for part in parts if part.stop_rank == rank]
            for part in together:
                part.ask_to_stop()
            for part in together:
                part.stop(hurry)

    def _how_it_ended(self, part: Part) -> str | None:
        try:
            return part.ended()
        except Refused as error:
            if not self.has_been_ready:
                raise Refused(f"{part.name}: {error}") from error
            return f"cannot start: {error}"

    def _plan_restart(self, watched: _Watched, how: str) -> None:
        """Each failure in a row doubles the delay; a long run resets it."""
        now = self.clock()
        steady = now - watched.started_at >= STEADY_SECONDS
        watched.failures = 1 if steady else watched.failures + 1
        delay = min(self.max_delay_seconds, FIRST_DELAY_SECONDS * 2 ** (watched.failures - 1))
        watched.start_at = now + delay
        self.restarts += 1
        self.say(f"{watched.part.name} {how}; starting it again in {delay:g} s")
