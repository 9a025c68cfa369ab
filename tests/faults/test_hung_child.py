"""A part that hangs is killed with its reason and started again; one that is slow is left alone."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.platform.processes import is_running, state
from tests.waiting import wait_for
from tinkerapi.server.supervisor import (
    LAST_WORDS_SECONDS,
    LONGEST_LOOK_SECONDS,
    Child,
    Supervisor,
    Watch,
)

PULSE = "import os, time; fd = int(os.environ['FD']); os.write(fd, b'.')"
BEATS = f"{PULSE}\nwhile True: time.sleep(0.02); os.write(fd, b'.')"
BEATS_ONCE = f"import faulthandler; faulthandler.enable()\n{PULSE}\ntime.sleep(600)"
LIMIT = 30.0


class Clock:
    """The supervisor's clock, which the test moves on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines() -> list[str]:
    return []


Start = Callable[[str], tuple[Supervisor, Child]]


@pytest.fixture
def start(tmp_path: Path, clock: Clock, lines: list[str]) -> Iterator[Start]:
    """``start(program)``: a supervised Python program whose first sign of life has arrived."""
    supervisor = Supervisor(lines.append, clock=clock)

    def add(program: str) -> tuple[Supervisor, Child]:
        watch = Watch("FD", silence_seconds=LIMIT, clock=clock)
        child = Child(
            "worker",
            [sys.executable, "-c", program],
            dict(os.environ),
            tmp_path / "log",
            stop_seconds=5,
            parent_death_signal="KILL",
            stop_rank=0,
            watch=watch,
        )
        supervisor.add(child)
        clock.now += 1
        wait_for(lambda: watch.silent_seconds() == 0)
        return supervisor, child

    yield add
    supervisor.stop(lambda: True)


def wait(supervisor: Supervisor, clock: Clock, seconds: float) -> None:
    """Let time pass by the supervisor's clock, while it looks once a second."""
    end = clock.now + seconds
    while clock.now < end:
        clock.now = min(clock.now + 1, end)
        supervisor.tick()


def ended(supervisor: Supervisor, lines: list[str]) -> str:
    """The supervisor's message after it has noticed an end."""

    def look() -> str | None:
        supervisor.tick()
        return lines[-1] if lines else None

    return wait_for(look)


def test_a_silent_child_says_where_it_hangs_and_is_started_again(
    start: Start, clock: Clock, lines: list[str]
) -> None:
    supervisor, child = start(BEATS_ONCE)
    wait(supervisor, clock, LIMIT)
    assert lines == []

    wait(supervisor, clock, 0.1)
    said = ended(supervisor, lines)
    assert said == "worker made no progress for 30 s and was killed; starting it again in 0.5 s"
    assert "most recent call first" in child.log.read_text()

    wait(supervisor, clock, 1)
    assert child.ended() is None


def test_a_stopped_child_is_killed_although_it_hears_nothing(
    start: Start, clock: Clock, lines: list[str]
) -> None:
    supervisor, child = start(BEATS)
    assert child.process is not None
    pid = child.process.pid
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: state(pid) == "T")
    supervisor.tick()  # takes the beats from before

    wait(supervisor, clock, LIMIT + 0.1)
    assert is_running(pid)
    wait(supervisor, clock, LAST_WORDS_SECONDS)
    assert "made no progress" in ended(supervisor, lines)
    assert not is_running(pid)


def test_a_machine_that_was_paused_blames_nobody(
    start: Start, clock: Clock, lines: list[str]
) -> None:
    supervisor, child = start(BEATS_ONCE)
    for _ in range(int(LIMIT / LONGEST_LOOK_SECONDS)):
        clock.now += 100 * LIMIT
        supervisor.tick()
    assert lines == []
    assert child.ended() is None


def test_a_child_that_gets_on_is_left_alone_however_late_one_looks(
    start: Start, clock: Clock, lines: list[str]
) -> None:
    supervisor, child = start(BEATS)
    for _ in range(2 * int(LIMIT / LONGEST_LOOK_SECONDS)):
        clock.now += LIMIT
        assert child.watch is not None
        assert child.watch.reader is not None
        select.select([child.watch.reader], [], [])  # a beat is there; the clock stands still
        supervisor.tick()
    assert lines == []
    assert child.ended() is None
