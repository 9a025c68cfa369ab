"""Factories for owners, lanes, futures and workers; a test sets only the relevant values."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import pytest
from django.contrib.auth import get_user_model
from django.db import connections, transaction
from pytest_django import Settings

from futures.finishing import Outcome, futures_finish
from futures.models import Future, Lane, Worker
from futures.payload import encode
from futures.services import future_submit, lane_create
from futures.workers import worker_start

Result = TypeVar("Result")

QUEUE = "engine"

_numbers = itertools.count(1)


def is_served(queue: str) -> bool:
    """Every queue is; these tests make their own."""
    return True


@pytest.fixture(autouse=True)
def every_queue_is_served(settings: Settings) -> None:
    settings.FUTURES_QUEUE_IS_SERVED = f"{__name__}.{is_served.__name__}"


class SubmitFactory(Protocol):
    def __call__(self, lane: Lane | None = None, **fields: Any) -> Future: ...


@pytest.fixture
def owner_factory(db: None) -> Callable[[], Any]:
    def make() -> Any:
        return get_user_model().objects.create(username=f"owner {next(_numbers)}")

    return make


@pytest.fixture
def owner(owner_factory: Callable[[], Any]) -> Any:
    return owner_factory()


@pytest.fixture
def lane_factory(owner: Any) -> Callable[..., Lane]:
    def make(**fields: Any) -> Lane:
        defaults = {"lane_id": f"lane {next(_numbers)}", "owner_id": owner.pk, "queue": QUEUE}
        return lane_create(**(defaults | fields))

    return make


@pytest.fixture
def lane(lane_factory: Callable[..., Lane]) -> Lane:
    return lane_factory()


@pytest.fixture
def submit(owner: Any) -> SubmitFactory:
    def make(lane: Lane | None = None, **fields: Any) -> Future:
        defaults: dict[str, Any] = {
            "owner_id": lane.owner_id if lane else owner.pk,
            "queue": QUEUE,
            "kind": "add",
            "payload": {"number": 1},
            "lane_id": lane.pk if lane else None,
        }
        return future_submit(**(defaults | fields))

    return make


@pytest.fixture
def worker_factory(db: None) -> Iterator[Callable[..., Worker]]:
    """Started workers; their locks are released after the test, as by their death."""
    started: list[Worker] = []

    def make(queue: str = QUEUE) -> Worker:
        worker = worker_start(queue=queue, figures={"device": "test"})
        started.append(worker)
        return worker

    yield make
    for worker in started:
        kill(worker)


@pytest.fixture
def worker(worker_factory: Callable[..., Worker]) -> Worker:
    return worker_factory()


def kill(worker: Worker) -> None:
    """The remains of a worker after SIGKILL: its rows, without its lock."""
    assert worker.lock is not None
    worker.lock.release()


def finish(worker: Worker, *futures: Future, **outcome: Any) -> None:
    """Commit a result (or the outcome given) for each future."""
    outcome = outcome or {"result": encode({"sum": 2})}
    with transaction.atomic():
        futures_finish(
            worker=worker,
            outcomes=[Outcome(request_id=future.pk, **outcome) for future in futures],
            batch=1,
        )


def race(*calls: Callable[[], Result]) -> list[Result | Exception]:
    """Run the calls at once, each in a thread with its own connection."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Result]) -> Result | Exception:
        try:
            barrier.wait()
            return call()
        except Exception as error:
            return error
        finally:
            connections.close_all()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))
