"""The one-process consumer, with django-q's own tasks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from django.db import connections
from django_q.conf import Conf
from django_q.models import Failure, OrmQ
from django_q.tasks import async_task

from futures.consumer import Consumer
from futures.database import dedicated_parameters
from futures.notify import notify_bell
from tests.futures.conftest import QUEUE, SubmitFactory
from tests.waiting import LONG_SECONDS

pytestmark = pytest.mark.django_db(transaction=True)

seen: list[Any] = []
"""The arguments of the tasks below."""

arrived = threading.Semaphore(0)
"""Released once for each of those calls."""


def note(value: Any) -> None:
    seen.append(value)
    arrived.release()


def fail() -> None:
    arrived.release()
    raise RuntimeError("no luck")


def leave() -> None:
    raise SystemExit(3)


def ring(task: str, *args: Any) -> None:
    async_task(f"{__name__}.{task}", *args, cluster=QUEUE)


class Running:
    """A consumer in a thread."""

    def __init__(self) -> None:
        seen.clear()
        while arrived.acquire(blocking=False):  # calls that the test before did not wait for
            pass
        self.consumer = Consumer(QUEUE)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.consumer.run()
        except BaseException as error:
            self.error = error
        finally:
            connections.close_all()

    def stop(self) -> None:
        self.consumer.stopping.set()
        self.thread.join(LONG_SECONDS)
        assert not self.thread.is_alive()


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.stop()


def test_tasks_run_in_order_and_are_acknowledged(running: Running) -> None:
    for number in range(5):
        ring("note", number)
    for _ in range(5):
        assert arrived.acquire(timeout=LONG_SECONDS)
    running.stop()

    assert seen == [0, 1, 2, 3, 4]
    assert not OrmQ.objects.exists()


@pytest.mark.parametrize("woken", ["by a notification", "by a turn", "at its poll"])
def test_a_consumer_that_shares_its_queue_looks_also_without_a_doorbell(
    running: Running, settings: Any, woken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one may have taken the doorbell of a future that is for this one."""
    settings.FUTURES_TASK = f"{__name__}.note"
    monkeypatch.setattr(Conf, "POLL", 0.01 if woken == "at its poll" else LONG_SECONDS)
    running.consumer.on_turn = lambda: woken == "by a turn"
    running.consumer.shares_queue = True
    if woken == "by a notification":
        notify_bell(QUEUE)

    assert arrived.acquire(timeout=LONG_SECONDS)
    running.stop()
    assert set(seen) == {QUEUE}
    assert not OrmQ.objects.exists()


def test_a_failed_task_is_recorded_and_the_next_one_runs(running: Running) -> None:
    ring("fail")
    ring("note", "after")
    for _ in range(2):
        assert arrived.acquire(timeout=LONG_SECONDS)
    running.stop()

    assert seen == ["after"]
    assert "no luck" in Failure.objects.get().result
    assert not OrmQ.objects.exists()


def test_a_doorbell_calls_the_task_of_the_settings(
    running: Running, submit: SubmitFactory, settings: Any
) -> None:
    settings.FUTURES_TASK = f"{__name__}.note"

    submit()

    assert arrived.acquire(timeout=LONG_SECONDS)
    running.stop()
    assert seen == [QUEUE]


def test_a_task_that_is_not_ours_is_dropped_and_never_unpickled(running: Running) -> None:
    OrmQ.objects.create(key=QUEUE, payload="forged:signature", lock="2000-01-01T00:00Z")
    ring("note", "ours")

    assert arrived.acquire(timeout=LONG_SECONDS)
    running.stop()
    assert seen == ["ours"]
    assert not OrmQ.objects.exists()


def test_a_stopped_consumer_leaves_the_rest_in_the_queue() -> None:
    running = Running()
    running.stop()
    ring("note", "later")

    assert seen == []
    assert OrmQ.objects.count() == 1


def test_a_task_can_end_the_process() -> None:
    running = Running()
    ring("leave")
    running.thread.join(LONG_SECONDS)

    assert isinstance(running.error, SystemExit)


def test_the_consumer_outlives_its_connections(running: Running) -> None:
    ring("note", "before")
    assert arrived.acquire(timeout=LONG_SECONDS)
    with psycopg.connect(**dedicated_parameters()) as other:
        other.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    connections.close_all()

    ring("note", "after")

    assert arrived.acquire(timeout=LONG_SECONDS)
    running.stop()
    assert seen == ["before", "after"]


PROGRAM = """
import django, os, signal
django.setup()
from futures.consumer import Consumer

def interrupt(queue):
    os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
    assert consumer.stopping.wait(100)
    print("finished the task", queue, flush=True)

import __main__, sys
sys.modules["program"] = __main__
consumer = Consumer("engine")
consumer.run()
print("stopped", flush=True)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_consumer_after_its_current_task(
    name: str, submit: SubmitFactory, settings: Any
) -> None:
    settings.FUTURES_TASK = "program.interrupt"
    submit()
    submit()
    database = connections["default"].get_connection_params()
    url = f"postgresql://{database['user']}@/{database['dbname']}?host={database['host']}"

    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={
            **os.environ,
            "DATABASE_URL": url,
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            "SIGNAL": name,
        },
        capture_output=True,
        text=True,
        timeout=LONG_SECONDS,
        check=False,
    )

    assert ended.stdout.splitlines() == [f"finished the task {QUEUE}", "stopped"], ended.stderr
    assert ended.returncode == 0
    assert OrmQ.objects.count() == 1
