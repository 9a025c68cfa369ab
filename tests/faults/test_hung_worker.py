"""A worker whose engine hangs is replaced, and what it held runs in the next one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.db import connections

from futures.models import Future, Worker
from tests.platform.processes import wait_for
from tests.server import ROOT
from tinkerapi.supervisor import Child, Supervisor, Watch
from training import services
from training.types import Conversation, Message

pytestmark = pytest.mark.django_db(transaction=True)

LIMIT = 30.0

PROGRAM = """
import sys, threading
from pathlib import Path
import django
django.setup()
from training.base_models import base_model_get
from training.engine.fake import FakeEngine
from training.worker.process import run_worker

hung = Path(sys.argv[1])

def hang_once(verb, adapter_names):
    if verb == "forward_backward" and not hung.exists():
        hung.touch()
        threading.Event().wait()

run_worker(base_model_get(None), lambda base_model: FakeEngine(before_verb=hang_once))
"""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def supervisor(clock: Clock, lines: list[str], tmp_path: Path) -> Iterator[Supervisor]:
    """Keeps a worker running that hangs in its first pass, on this test's database."""
    database = connections["default"].get_connection_params()
    url = f"postgresql://{database['user']}@/{database['dbname']}?host={database['host']}"
    supervisor = Supervisor(lines.append, clock=clock)
    supervisor.add(
        Child(
            "worker",
            [sys.executable, "-c", PROGRAM, str(tmp_path / "hung")],
            {
                **os.environ,
                "DATABASE_URL": url,
                "DJANGO_SETTINGS_MODULE": "tests.settings",
                "PYTHONPATH": str(ROOT),
            },
            tmp_path / "log",
            stop_seconds=10,
            parent_death_signal="KILL",
            stop_rank=0,
            watch=Watch("TINKERAPI_PULSE_FD", silence_seconds=LIMIT, clock=clock),
        )
    )
    yield supervisor
    supervisor.stop(lambda: False)


def test_a_worker_whose_engine_hangs_is_replaced_and_its_request_runs(
    supervisor: Supervisor, clock: Clock, lines: list[str], tmp_path: Path
) -> None:
    owner = User.objects.create_user("ada")
    future = services.forward_backward_submit(
        owner_id=owner.pk,
        model_id="m",
        data=[Conversation((Message("user", "hi"), Message("assistant", "hello")))],
        loss_fn="cross_entropy",
        loss_fn_config={},
    ).future
    wait_for((tmp_path / "hung").exists, seconds=30)

    # Its heartbeat thread lives on, and that must not count.
    clock.now += LIMIT / 2
    supervisor.tick()
    clock.now += LIMIT + 0.1

    def said() -> list[str]:
        supervisor.tick()
        return lines

    wait_for(said, seconds=30)
    assert "worker made no progress for 30 s and was killed" in lines[0]

    clock.now += 1
    supervisor.tick()

    def final() -> Future | None:
        return Future.objects.filter(pk=future.pk, state__in=["ready", "failed"]).first()

    done = wait_for(final, seconds=30)
    assert (done.state, done.attempts) == ("ready", 1), done.error
    assert "hang_once" in (tmp_path / "log").read_text()  # where it hung
    assert list(Worker.objects.order_by("pk").values_list("state", flat=True)) == ["lost", "live"]
