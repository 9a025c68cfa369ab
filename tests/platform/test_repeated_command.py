"""A command that ``up`` repeats: when it starts, and what follows its end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tinkerapi.server.repeated_command import RETRY_SECONDS, STEADY_SECONDS, RepeatedCommand

HOUR = 3600.0
EVERY = 24 * HOUR


class Time:
    """A monotonic clock, and a wall clock that can be set."""

    def __init__(self) -> None:
        self.now = 100.0
        self.offset = 1.8e9

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now + self.offset


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, time: Time, said: list[str]) -> Callable[[str], RepeatedCommand]:
    def make(code: str) -> RepeatedCommand:
        return RepeatedCommand(
            "pruning",
            [sys.executable, "-c", code],
            os.environ,
            tmp_path / "logs" / "pruning.log",
            tmp_path / "last_prune",
            EVERY,
            said.append,
            clock=time.monotonic,
            wall_clock=time.wall,
        )

    return make


def pass_time(command: RepeatedCommand, time: Time, seconds: float) -> None:
    """Tick as ``up`` does, though more rarely; the wall clock goes on too."""
    for _ in range(round(seconds / 60)):
        time.now += 60
        command.tick()
        if command.process is not None:
            command.process.wait()
            command.tick()
            if command.stamp.exists():
                os.utime(command.stamp, (time.wall(), time.wall()))  # its clock is the test's


def runs(command: RepeatedCommand) -> int:
    return command.log.read_text().count("ran") if command.log.exists() else 0


def test_it_runs_once_the_clocks_are_steady_and_then_at_its_interval(
    make: Callable[[str], RepeatedCommand], time: Time
) -> None:
    command = make("print('ran')")
    pass_time(command, time, STEADY_SECONDS - 60)
    assert runs(command) == 0
    pass_time(command, time, 180)
    assert runs(command) == 1
    pass_time(command, time, 23 * HOUR)
    assert runs(command) == 1
    pass_time(command, time, 1.1 * HOUR)
    assert runs(command) == 2


def test_a_restart_does_not_repeat_it(make: Callable[[str], RepeatedCommand], time: Time) -> None:
    pass_time(make("print('ran')"), time, HOUR)
    again = make("print('ran')")
    pass_time(again, time, 20 * HOUR)
    assert runs(again) == 1


def test_a_clock_that_was_set_forward_does_not_start_it(
    make: Callable[[str], RepeatedCommand], time: Time
) -> None:
    command = make("print('ran')")
    pass_time(command, time, HOUR)
    assert runs(command) == 1
    time.offset += 365 * EVERY
    pass_time(command, time, STEADY_SECONDS - 120)
    assert runs(command) == 1
    time.offset -= 365 * EVERY  # corrected
    pass_time(command, time, 2 * HOUR)
    assert runs(command) == 1


def test_a_failure_is_said_and_tried_again_later(
    make: Callable[[str], RepeatedCommand], time: Time, said: list[str]
) -> None:
    command = make("import sys; print('ran'); sys.exit(3)")
    pass_time(command, time, STEADY_SECONDS + 120)
    assert runs(command) == 1
    assert not command.stamp.exists()
    assert len(said) == 1
    assert said[0].startswith("pruning ended with exit code 3; ")
    pass_time(command, time, RETRY_SECONDS + 120)
    assert runs(command) == 2


def test_a_command_that_cannot_start_does_not_end_the_server(
    make: Callable[[str], RepeatedCommand], time: Time, said: list[str], tmp_path: Path
) -> None:
    (tmp_path / "logs").write_text("a file in place of the folder")
    command = make("print('ran')")
    pass_time(command, time, STEADY_SECONDS + 120)
    assert len(said) == 1
    assert said[0].startswith("pruning did not start: ")


def test_it_ends_with_up(make: Callable[[str], RepeatedCommand], time: Time) -> None:
    command = make("import time; print('ran', flush=True); time.sleep(600)")
    time.now += STEADY_SECONDS
    command.tick()
    time.now += STEADY_SECONDS
    command.tick()
    process = command.process
    assert process is not None
    command.stop()
    assert process.returncode == -signal.SIGTERM
