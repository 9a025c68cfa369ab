"""How many threads a worker uses beside other processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from training.devices import count_cores
from training.engine.fake.trainer import FakeTrainer
from training.worker.idle_cores import (
    LOOK_SECONDS,
    IdleCores,
    UseIdleCores,
    seconds_busy,
    threads_running,
)


class Machine:
    """Counters of CPU time as the system has them."""

    def __init__(self) -> None:
        self.now = self.own = self.busy = 0.0
        self.running: int | None = None

    def pass_time(self, seconds: float, *, ours: float, others: float) -> None:
        """``ours`` and ``others``: cores that are busy meanwhile."""
        self.now += seconds
        self.own += ours * seconds
        self.busy += (ours + others) * seconds

    def cores(self, number: int) -> IdleCores:
        return IdleCores(
            clock=lambda: self.now,
            own_seconds=lambda: self.own,
            busy_seconds=lambda: self.busy,
            num_running=lambda: self.running,
            num_cores=number,
        )


@pytest.mark.parametrize(
    ("cores", "ours", "others", "threads"),
    [
        (2, 0.0, 0.0, 2),
        (2, 1.9, 0.1, 2),  # web and Postgres
        (2, 1.0, 1.0, 1),  # a program of somebody else
        (2, 1.3, 0.7, 1),  # the same beside two of our threads
        (2, 0.2, 1.8, 1),  # never none
        (16, 4.0, 3.6, 12),
        (16, 1.0, 0.4, 16),
        (1, 1.0, 0.0, 1),
    ],
)
def test_a_worker_uses_what_others_leave(
    cores: int, ours: float, others: float, threads: int
) -> None:
    machine = Machine()
    idle = machine.cores(cores)
    machine.pass_time(1.0, ours=ours, others=others)
    assert idle.look() == threads


def test_the_number_follows_the_load() -> None:
    machine = Machine()
    idle = machine.cores(2)
    found = []
    for others in (0.0, 1.0, 1.0, 0.0):
        machine.pass_time(LOOK_SECONDS, ours=1.0, others=others)
        found.append(idle.look())
    assert found == [2, 1, 1, 2]


def test_too_short_a_time_is_not_measured() -> None:
    machine = Machine()
    idle = machine.cores(2)
    machine.pass_time(LOOK_SECONDS * 0.9, ours=1.0, others=1.0)
    assert idle.look() is None
    machine.pass_time(LOOK_SECONDS * 0.2, ours=1.0, others=1.0)
    assert idle.look() == 1


def test_cores_of_a_process_that_has_just_ended_are_used_at_once() -> None:
    machine = Machine()
    idle = machine.cores(2)
    machine.pass_time(LOOK_SECONDS, ours=0.0, others=1.0)
    assert idle.look() == 1
    machine.running = 2  # it and we
    machine.pass_time(0.1, ours=1.0, others=1.0)
    assert idle.look() is None
    machine.running = 1
    machine.pass_time(0.1, ours=1.0, others=0.0)
    assert idle.look() == 2
    machine.pass_time(LOOK_SECONDS, ours=2.0, others=0.0)  # measured from that moment on
    assert idle.look() == 2


def test_cores_that_are_idle_at_moments_only_are_taken_once() -> None:
    machine = Machine()
    idle = machine.cores(2)
    machine.running = 1
    found = []
    for _ in range(40):
        machine.pass_time(0.1, ours=1.0, others=0.8)
        found.append(idle.look())
    assert found.count(2) == 1
    for _ in range(6):  # it ends
        machine.pass_time(0.1, ours=1.0, others=0.0)
        found.append(idle.look())
    assert [n for n in found if n][-1] == 2


def test_what_runs_is_looked_at_now_and_then() -> None:
    """Each layer of a pass asks, and reading the number takes microseconds."""
    machine, looks = Machine(), []
    idle = IdleCores(
        clock=lambda: machine.now,
        own_seconds=lambda: machine.own,
        busy_seconds=lambda: machine.busy,
        num_running=lambda: looks.append(machine.now) or 2,
        num_cores=2,
    )
    machine.pass_time(LOOK_SECONDS, ours=0.0, others=1.0)
    for _ in range(400):
        idle.look()
        machine.pass_time(0.001, ours=1.0, others=1.0)
    assert 10 <= len(looks) <= 21


def test_this_machine_reports_what_runs(tmp_path: Path) -> None:
    running = threads_running()
    assert running is not None
    assert running >= 1
    assert threads_running(tmp_path / "missing") is None


def test_where_nothing_is_reported_one_core_is_left_to_others() -> None:
    machine = Machine()
    idle = IdleCores(
        clock=lambda: machine.now, own_seconds=lambda: 0, busy_seconds=lambda: None, num_cores=4
    )
    machine.pass_time(1.0, ours=1.0, others=0.0)
    assert idle.look() == 3


@pytest.fixture
def stat(tmp_path: Path) -> Callable[[str], Path]:
    def write(content: str) -> Path:
        path = tmp_path / "stat"
        path.write_text(content)
        return path

    return write


def test_the_time_of_this_process_cores_counts_without_idle_time(
    stat: Callable[[str], Path],
) -> None:
    tick = os.sysconf("SC_CLK_TCK")
    core = min(os.sched_getaffinity(0))
    # user nice system idle iowait irq softirq steal guest guest_nice
    line = f"{tick} {2 * tick} {3 * tick} 500 600 0 0 {4 * tick} 7 8"
    other = max(os.sched_getaffinity(0)) + 1
    path = stat(f"cpu  9 9 9 9 9 9 9 9 9 9\ncpu{core} {line}\ncpu{other} {line}\nintr 1\n")
    assert seconds_busy(path) == 10.0
    assert seconds_busy(path.with_name("missing")) is None


def test_this_machine_reports_the_time_of_this_process() -> None:
    before, own = seconds_busy(), os.times().user
    while os.times().user < own + 0.5:
        sum(range(10_000))
    after = seconds_busy()
    assert before is not None
    assert after is not None
    assert after - before > 0.3


@pytest.mark.parametrize(
    ("content", "most"), [("max 100000", 1024), ("150000 100000", 1), ("50000 100000", 1)]
)
def test_a_quota_is_not_exceeded(tmp_path: Path, content: str, most: int) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text(content)
    assert count_cores(quota) == min(most, len(os.sched_getaffinity(0)))
    assert count_cores(tmp_path / "none") == len(os.sched_getaffinity(0))


def test_the_number_of_threads_changes_while_the_worker_makes_progress() -> None:
    threads: list[int] = []
    signals: list[float] = []

    class Noting(FakeTrainer):
        def use_threads(self, count: int) -> None:
            threads.append(count)

    machine = Machine()
    on_turn = UseIdleCores(Noting(), machine.cores(2), then=lambda: signals.append(machine.now))
    for others in (1.0, 0.0):
        for _ in range(4):
            machine.pass_time(LOOK_SECONDS / 4, ours=1.0, others=others)
            on_turn()
    assert threads == [1, 2]
    assert len(signals) == 8
