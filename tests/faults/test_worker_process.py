"""A whole worker under its supervisor: it hangs, it is poisoned, a second one comes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.db import connections

from futures.models import Future, Worker
from tests.server import ROOT
from tests.waiting import LONG_SECONDS, wait_for
from tinkerapi.server.supervisor import Child, Supervisor, Watch
from training import services
from training.types import Conversation, Message

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


def test_a_second_worker_of_the_queue_is_turned_away_and_the_first_works_on(
    supervisor: Supervisor,
    clock: Clock,
    environment: dict[str, str],
    tmp_path: Path,
    owner: User,
) -> None:
    finished(supervisor, clock, submit(owner, "good"))
    second = subprocess.run(
        [*COMMAND, str(tmp_path)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LONG_SECONDS,
        check=False,
    )
    assert second.returncode != 0
    assert "QueueTaken" in second.stderr
    assert finished(supervisor, clock, submit(owner, "good")).state == "ready"
    assert Worker.objects.count() == 1
