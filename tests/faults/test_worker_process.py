"""Whole workers under their supervisor: one hangs, one is poisoned, two share the work."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.db import connections

from futures.lost_workers import worker_reap
from futures.models import Future, Lane, Worker
from futures.payload import decode, encode
from tests.server import ROOT
from tests.waiting import wait_for
from tinkerapi.server.supervisor import Child, Supervisor, Watch
from training import services
from training.types import AdamParams, Conversation, Message

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]

LIMIT = 30.0
COMMAND = [sys.executable, "-m", "tests.faults.faulty_worker"]


class Clock:
    """The supervisor's; nothing here waits for real seconds to pass."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines() -> list[str]:
    """The supervisor's messages."""
    return []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def environment() -> dict[str, str]:
    """A process of this environment works on this test's database."""
    database = connections["default"].get_connection_params()
    return {
        **os.environ,
        "DATABASE_URL": f"postgresql://{database['user']}@/{database['dbname']}"
        f"?host={database['host']}",
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture
def supervisor(
    clock: Clock, lines: list[str], environment: dict[str, str], tmp_path: Path
) -> Iterator[Supervisor]:
    """Keeps a worker with a faulty engine running."""
    supervisor = Supervisor(lines.append, clock=clock)
    supervisor.add(
        Child(
            "worker",
            [*COMMAND, str(tmp_path)],
            environment,
            tmp_path / "log",
            stop_seconds=10,
            parent_death_signal="KILL",
            stop_rank=0,
            watch=Watch("TINKERAPI_WATCHDOG_FD", silence_seconds=LIMIT, clock=clock),
        )
    )
    yield supervisor
    supervisor.stop(lambda: False)


def submit(owner: User, words: str) -> Future:
    return services.forward_backward_submit(
        owner_id=owner.pk,
        model_id="m",
        data=[Conversation((Message("user", words), Message("assistant", "hello")))],
        loss_fn="cross_entropy",
        loss_fn_config={},
    ).future


def finished(supervisor: Supervisor, clock: Clock, future: Future) -> Future:
    """The future once it is final; workers that end meanwhile are started again at once."""

    def look() -> Future | None:
        supervisor.tick()
        clock.now += 0.01
        return Future.objects.filter(pk=future.pk, state__in=["ready", "failed"]).first()

    return wait_for(look)


def test_a_worker_whose_engine_hangs_is_replaced_and_its_request_runs(
    supervisor: Supervisor, clock: Clock, lines: list[str], tmp_path: Path, owner: User
) -> None:
    future = submit(owner, "hang")
    wait_for((tmp_path / "hung").exists)
    supervisor.tick()  # hears the signs of life from before
    # Its heartbeat thread lives on, and that must not count.
    for _ in range(int(LIMIT) + 1):
        clock.now += 1
        supervisor.tick()
    done = finished(supervisor, clock, future)
    assert "worker made no progress for 30 s and was killed" in lines[0]
    assert "forward_backward" in (tmp_path / "log").read_text()
    assert (done.state, done.attempts) == ("ready", 1), done.error
    assert list(Worker.objects.order_by("pk").values_list("state", flat=True)) == ["lost", "live"]


def test_a_poisonous_request_fails_by_name_after_three_workers_and_the_rest_go_on(
    supervisor: Supervisor, clock: Clock, lines: list[str], owner: User
) -> None:
    futures = [submit(owner, words) for words in ("good", "poison", "good")]
    good, poison, after = [finished(supervisor, clock, future) for future in futures]
    assert [good.state, poison.state, after.state] == ["ready", "failed", "ready"]
    assert (poison.error_code, poison.attempts) == ("CrashedWorker", 3)
    assert lines[0].startswith("worker was ended by SIGSEGV; starting it again")
    assert len(lines) == 3


def work_through(supervisor: Supervisor, clock: Clock, futures: list[Future]) -> list[Future]:
    """The futures once all are final; workers that end meanwhile are started again at once."""
    return [finished(supervisor, clock, future) for future in futures]


def submit_step(owner: User, name: str, step: int) -> list[Future]:
    """One step of a run; the same for each run."""
    turns = (Message("user", f"question {step}"), Message("assistant", "hello"))
    passed = services.forward_backward_submit(
        owner_id=owner.pk,
        model_id=name,
        data=[Conversation(turns)],
        loss_fn="cross_entropy",
        loss_fn_config={},
    )
    stepped = services.optim_step_submit(
        owner_id=owner.pk, model_id=name, adam_params=AdamParams(learning_rate=0.1)
    )
    return [passed.future, stepped.future]


def result(future: Future) -> bytes:
    """The stored result, without the name of its run."""
    stored = decode(bytes(Future.objects.get(pk=future.pk).result or b""))
    return encode({**stored, "model_id": ""})


def add_second_worker(supervisor: Supervisor, environment: dict[str, str], tmp_path: Path) -> None:
    """Start another worker of the queue, and wait until both are live."""
    supervisor.add(
        Child(
            "second",
            [*COMMAND, str(tmp_path)],
            environment,
            tmp_path / "second log",
            stop_seconds=10,
            parent_death_signal="KILL",
            stop_rank=0,
        )
    )
    wait_for(lambda: Worker.objects.filter(state="live").count() == 2)


def test_two_workers_share_the_runs_and_one_that_is_killed_loses_nothing(
    supervisor: Supervisor,
    clock: Clock,
    environment: dict[str, str],
    tmp_path: Path,
    owner: User,
) -> None:
    """Whatever a run's worker, and whatever happened to it, its losses are those of a twin."""
    add_second_worker(supervisor, environment, tmp_path)
    names = [f"run-{number}" for number in range(6)]
    futures: dict[str, list[Future]] = {name: [] for name in names}
    for step in range(4):
        for name in names:
            futures[name] += submit_step(owner, name, step)
        if step == 1:
            work_through(supervisor, clock, [future for own in futures.values() for future in own])
            holders = set(Lane.objects.exclude(worker=None).values_list("worker_id", flat=True))
            assert len(holders) == 2
            victim = Worker.objects.get(pk=min(holders))
            for name in names:
                futures[name] += submit_step(owner, name, 99)
            os.kill(victim.pid, signal.SIGKILL)
    done = work_through(supervisor, clock, [future for own in futures.values() for future in own])

    assert {future.state for future in done} == {"ready"}
    victim.refresh_from_db()
    assert victim.state == "lost"
    assert not Lane.objects.filter(worker=victim).exists()
    results = {name: [result(future) for future in own] for name, own in futures.items()}
    assert all(own == results[names[0]] for own in results.values())


def test_a_worker_that_is_stopped_and_continued_commits_nothing_of_what_others_did(
    supervisor: Supervisor,
    clock: Clock,
    environment: dict[str, str],
    tmp_path: Path,
    owner: User,
) -> None:
    first = work_through(supervisor, clock, submit_step(owner, "m", 0))
    stopped = Worker.objects.get()
    os.kill(stopped.pid, signal.SIGSTOP)
    try:
        futures = [future for step in range(1, 4) for future in submit_step(owner, "m", step)]
        add_second_worker(supervisor, environment, tmp_path)
        worker_reap(stopped, crashed=lambda worker: False, must_be_unlocked=False)
        second = Worker.objects.get(state="live")
        done = work_through(supervisor, clock, futures)
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    wait_for(lambda: "leaving" in (tmp_path / "log").read_text())

    assert {future.worker_id for future in first} == {stopped.pk}
    assert {(future.state, future.worker_id) for future in done} == {("ready", second.pk)}
    more = work_through(supervisor, clock, submit_step(owner, "m", 4))
    assert {(future.state, future.worker_id) for future in more} == {("ready", second.pk)}
