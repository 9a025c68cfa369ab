"""The supervisor: restarts with back-off, stops in order, leaves no process behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.platform.processes import is_running
from tests.waiting import LONG_SECONDS, wait_for
from tinkerapi.server.supervisor import (
    FIRST_DELAY_SECONDS,
    MAX_DELAY_SECONDS,
    STEADY_SECONDS,
    Child,
    Refused,
    Supervisor,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakePart:
    """A part that runs until the test says that it ended."""

    def __init__(self, name: str, calls: list[str], stop_rank: int = 0) -> None:
        self.name = name
        self.stop_rank = stop_rank
        self.calls = calls
        self.end: str | None = None
        self.refusal: str | None = None
        self.fails_to_start = False

    def start(self) -> None:
        self.calls.append(f"start {self.name}")
        if self.fails_to_start:
            raise OSError("no room")
        self.end = None

    def ended(self) -> str | None:
        if self.refusal is not None:
            raise Refused(self.refusal)
        return self.end

    def ask_to_stop(self) -> None:
        self.calls.append(f"ask {self.name}")

    def stop(self, hurry: Callable[[], bool]) -> None:
        self.calls.append(f"stop {self.name}")


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def supervisor(lines: list[str], clock: Clock) -> Supervisor:
    return Supervisor(lines.append, clock=clock)


def test_a_part_that_ends_is_started_again_after_a_delay(
    supervisor: Supervisor, calls: list[str], lines: list[str], clock: Clock
) -> None:
    part = FakePart("web", calls)
    supervisor.add(part)

    part.end = "was ended by SIGKILL"
    supervisor.tick()
    assert calls == ["start web"]
    assert lines == ["web was ended by SIGKILL; starting it again in 0.5 s"]
    assert supervisor.restarts == 1

    clock.now += FIRST_DELAY_SECONDS
    supervisor.tick()
    assert calls == ["start web", "start web"]
    supervisor.tick()
    assert len(calls) == 2


def test_each_failure_in_a_row_doubles_the_delay_up_to_a_limit(
    supervisor: Supervisor, calls: list[str], clock: Clock
) -> None:
    part = FakePart("worker", calls)
    supervisor.add(part)
    delays = []
    for _ in range(9):
        part.end = "ended"
        supervisor.tick()
        died_at, starts = clock.now, len(calls)
        while len(calls) == starts:
            clock.now += FIRST_DELAY_SECONDS
            supervisor.tick()
        delays.append(clock.now - died_at)

    assert delays[:6] == [0.5, 1, 2, 4, 8, 16]
    assert delays[6:] == [MAX_DELAY_SECONDS] * 3


def test_the_longest_delay_can_be_chosen(lines: list[str], calls: list[str], clock: Clock) -> None:
    supervisor = Supervisor(lines.append, clock=clock, max_delay_seconds=1.0)
    part = FakePart("worker", calls)
    supervisor.add(part)
    for _ in range(4):
        part.end = "ended"
        supervisor.tick()
        clock.now += 1.0
        supervisor.tick()

    assert [line.rsplit("in ", 1)[1] for line in lines] == ["0.5 s", "1 s", "1 s", "1 s"]


def test_a_steady_life_forgives_earlier_failures(
    supervisor: Supervisor, calls: list[str], lines: list[str], clock: Clock
) -> None:
    part = FakePart("worker", calls)
    supervisor.add(part)
    for _ in range(2):
        part.end = "ended"
        supervisor.tick()
        clock.now += MAX_DELAY_SECONDS
        supervisor.tick()

    clock.now += STEADY_SECONDS
    part.end = "ended"
    supervisor.tick()

    assert [line.rsplit("in ", 1)[1] for line in lines] == ["0.5 s", "1 s", "0.5 s"]


def test_a_restart_that_fails_is_tried_again(
    supervisor: Supervisor, calls: list[str], lines: list[str], clock: Clock
) -> None:
    part = FakePart("postgres", calls)
    supervisor.add(part)
    part.end = "was ended by SIGKILL"
    part.fails_to_start = True
    supervisor.tick()
    clock.now += 1
    supervisor.tick()
    assert lines[-1] == "postgres did not start: no room; starting it again in 1 s"

    part.fails_to_start = False
    clock.now += 1
    supervisor.tick()
    assert part.ended() is None


def test_a_part_that_can_never_start_is_not_started_again(
    supervisor: Supervisor, calls: list[str], lines: list[str]
) -> None:
    part = FakePart("worker", calls)
    supervisor.add(part)
    part.refusal = "no such model"

    with pytest.raises(Refused, match="worker: no such model"):
        supervisor.tick()

    assert (calls, lines) == (["start worker"], [])


def test_what_worked_once_is_tried_again_also_after_a_refusal(
    supervisor: Supervisor, calls: list[str], lines: list[str], clock: Clock
) -> None:
    part = FakePart("worker", calls)
    supervisor.add(part)
    supervisor.has_been_ready = True
    part.refusal = "no such model"
    supervisor.tick()
    assert lines == ["worker cannot start: no such model; starting it again in 0.5 s"]

    part.refusal = None
    clock.now += 1
    supervisor.tick()
    assert calls == ["start worker"] * 2


def test_one_part_in_trouble_does_not_disturb_the_others(
    supervisor: Supervisor, calls: list[str], clock: Clock
) -> None:
    web, worker = FakePart("web", calls), FakePart("worker", calls)
    supervisor.add(web)
    supervisor.add(worker)
    for _ in range(5):
        worker.end = "ended"
        supervisor.tick()
        clock.now += MAX_DELAY_SECONDS

    assert calls.count("start web") == 1
    assert calls.count("stop web") == 0


def test_parts_are_stopped_rank_by_rank_also_one_whose_start_failed(
    supervisor: Supervisor, calls: list[str]
) -> None:
    supervisor.add(FakePart("postgres", calls, stop_rank=9))
    supervisor.add(FakePart("web", calls, stop_rank=0))
    supervisor.add(FakePart("worker a", calls, stop_rank=1))
    failing = FakePart("worker b", calls, stop_rank=1)
    failing.fails_to_start = True
    with pytest.raises(OSError, match="no room"):
        supervisor.add(failing)
    calls.clear()

    supervisor.stop(lambda: False)

    assert calls == [
        *("ask web", "stop web"),
        # Together: each may have a batch to finish.
        *("ask worker a", "ask worker b", "stop worker a", "stop worker b"),
        *("ask postgres", "stop postgres"),
    ]
    supervisor.tick()
    assert len(calls) == 8, "what was stopped stays stopped"


@pytest.fixture
def child(tmp_path: Path) -> Callable[..., Child]:
    def make(
        script: str, *, stop_seconds: float = LONG_SECONDS, refusal_status: int | None = None
    ) -> Child:
        return Child(
            "part",
            [sys.executable, "-c", script],
            os.environ,
            tmp_path / "logs" / "part.log",
            stop_seconds,
            parent_death_signal="KILL",
            stop_rank=0,
            refusal_status=refusal_status,
        )

    return make


def test_a_command_that_fails_is_quoted_by_its_last_line(child: Callable[..., Child]) -> None:
    part = child("import sys; print('loading', flush=True); sys.exit('no such model')")
    part.start()
    assert wait_for(part.ended) == "ended with exit code 1: no such model"

    quiet = child("import sys; sys.exit(3)")  # same log: the earlier words are not its own
    quiet.start()
    assert wait_for(quiet.ended) == "ended with exit code 3"


def test_a_command_refuses_to_start_by_an_exit_code_of_its_own(
    child: Callable[..., Child],
) -> None:
    sentence = "no such model " + "m" * 1000
    part = child(f"import sys; print('{sentence}'); sys.exit(78)", refusal_status=78)
    part.start()
    with pytest.raises(Refused, match=sentence):
        wait_for(part.ended)

    crashing = child("import sys; sys.exit(77)", refusal_status=78)
    crashing.start()
    assert wait_for(crashing.ended) == "ended with exit code 77"


def test_a_killed_command_takes_its_own_children_along(child: Callable[..., Child]) -> None:
    part = child(
        "import subprocess, sys, time; "
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "print(inner.pid, flush=True); time.sleep(600)"
    )
    part.start()
    inner = int(wait_for(part.crash_log))
    assert part.process is not None
    part.process.kill()

    assert wait_for(part.ended) == "was ended by SIGKILL"
    wait_for(lambda: not is_running(inner))


def test_stopping_asks_first_and_waits(child: Callable[..., Child], tmp_path: Path) -> None:
    part = child(
        "import signal, sys, time; "
        "signal.signal(signal.SIGTERM, lambda *_: (print('wrote all'), sys.exit())); "
        "print('up', flush=True); time.sleep(600)"
    )
    part.start()
    wait_for(part.crash_log)

    part.ask_to_stop()
    part.stop(lambda: False)

    assert part.crash_log() == "wrote all"


@pytest.mark.parametrize(("stop_seconds", "hurry"), [(0.05, False), (60.0, True)])
def test_who_does_not_stop_in_time_is_killed(
    child: Callable[..., Child], stop_seconds: float, hurry: bool
) -> None:
    part = child(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('up', flush=True); time.sleep(600)",
        stop_seconds=stop_seconds,
    )
    part.start()
    wait_for(part.crash_log)
    assert part.process is not None
    pid = part.process.pid

    part.ask_to_stop()
    part.stop(lambda: hurry)

    assert not is_running(pid)
