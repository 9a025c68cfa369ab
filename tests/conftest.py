"""Fixtures for every test: a real Postgres, and a temporary data folder."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import connections
from django.test import Client

from futures import worker_lock, workers
from futures.batched_reads import FutureReader
from futures.broker import PostgresBroker
from futures.models import Future
from tests.waiting import LONG_SECONDS
from tinkerapi.api import async_view, dispatch, threads
from tinkerapi.api.quickref import render as answers
from tinkerapi.server.postgres import EmbeddedPostgres
from training.base_models import base_model_get
from training.engine.fake.engine import fake_engine
from training.engine.interface import Engine
from training.vocabulary import TokenTable
from training.worker.loop import WorkLoop
from training.worker.text_pool import TextPool
from training.worker.texts import TEXT_RULES

# No test is about time, and a busy machine is slow.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def django_db_modify_db_settings(
    django_db_modify_db_settings_parallel_suffix: None,
) -> Iterator[None]:
    """Start the embedded Postgres, once a run and only if some test wants a database.

    It ends with the run, also when the run is killed. pytest-django makes the test database
    in it, and calls this first.
    """
    if settings.DATABASE_URL:
        yield
        return
    with EmbeddedPostgres(settings.DATA_DIR, durable=False):
        yield


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None) -> Iterator[None]:
    """pytest-django's, and at the end nothing holds the test database that is to be dropped.

    A request through Django's test client has an event loop of its own, which may end while
    the waiters' of that loop is still connecting; such a connection is closed when it is collected.
    """
    yield
    gc.collect()
    for executor, number in (
        (threads.executor, threads.DATABASE_THREADS),
        (threads.bulk_executor, threads.BULK_THREADS),
        (threads.storage_executor, threads.STORAGE_THREADS),
    ):
        every_thread = threading.Barrier(number)

        def close(every_thread: threading.Barrier = every_thread) -> None:
            every_thread.wait()
            connections.close_all()

        for closing in [executor.submit(close) for _ in range(number)]:
            closing.result()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of the marker ``vllm`` unless they are asked for: they need an
    environment of gigabytes."""
    if "vllm" in config.getoption("markexpr"):
        return
    left_out = [item for item in items if item.get_closest_marker("vllm")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("vllm")]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the data folder of this run."""
    shutil.rmtree(Path(settings.DATA_DIR), ignore_errors=True)


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    """Fails the test that leaves a live worker, and ends the worker: its queue is the next test's.

    The first fixture of every test, so the last one that ends.
    """
    taken: list[workers.WorkerLock] = []

    class NotedLock(workers.WorkerLock):
        def __init__(self, queue: str, epoch: int) -> None:
            super().__init__(queue, epoch)
            taken.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "WorkerLock", NotedLock)
        # A lock is free only when Postgres has seen that its connection is closed.
        patch.setattr(worker_lock, "_PATIENCE_SECONDS", LONG_SECONDS)
        yield
    left = [lock for lock in taken if lock.is_held]
    for lock in left:
        lock.release()
    assert not left, f"{len(left)} workers are still live after the test that started them"


class InProcessWorker:
    """The real work loop on a fake engine, stepped by the test instead of by doorbells."""

    def __init__(self, engine: Engine | None = None, text_pool: TextPool | None = None) -> None:
        self.engine = engine or fake_engine()
        figures = {"text_rules": TEXT_RULES}
        self.worker = workers.worker_start(queue=base_model_get(None).queue, figures=figures)
        self.loop = WorkLoop(
            self.engine,
            self.worker,
            stopping=lambda: False,
            bell_rang=lambda seconds: False,
            figures=dict(figures),
            text_pool=text_pool,
            token_table=TokenTable("", self.engine.renderer.token_bytes()),
        )

    def __call__(self) -> None:
        """Work until nothing may run."""
        self.loop.run_until_idle()

    def die(self) -> None:
        """End as after SIGKILL: nothing is released, only the lock is lost."""
        if self.worker.lock is not None:
            self.worker.lock.release()


@pytest.fixture
def start_worker(db: None) -> Iterator[Callable[..., InProcessWorker]]:
    """``start_worker()``: a new worker life; ``work = start_worker(); work()`` runs what waits.

    It takes the place of the last one, which dies, or works ``beside`` it.
    """
    started: list[InProcessWorker] = []

    def start(
        engine: Engine | None = None, text_pool: TextPool | None = None, *, beside: bool = False
    ) -> InProcessWorker:
        if started and not beside:
            started[-1].die()
        started.append(InProcessWorker(engine, text_pool))
        return started[-1]

    yield start
    for worker in started:
        worker.die()


@pytest.fixture
def work(start_worker: Callable[..., InProcessWorker]) -> InProcessWorker:
    """A worker that is live; ``work()`` runs everything that may run."""
    return start_worker()


def local_client(**options: Any) -> Client:
    """A client that asks for this machine, as one that needs no key must."""
    return Client(headers={"Host": "localhost"}, **options)


class ApiClient:
    """A client of the HTTP API: ``api.post("/fwdbwd", model_id="m", data=[...])``."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def post(self, path: str, /, headers: dict[str, str] | None = None, **body: object) -> Any:
        return self.client.post(path, body, content_type="application/json", headers=headers)

    def get(self, path: str, **headers: str) -> Any:
        return self.client.get(path, headers=headers)

    def delete(self, path: str, **headers: str) -> Any:
        return self.client.delete(path, headers=headers)


@pytest.fixture
def api(db: None, monkeypatch: pytest.MonkeyPatch) -> ApiClient:
    """The API without a server, inside the test's transaction: views run in this thread.

    Calls that wait need another process's commits, so they use ``served_api`` instead.
    """

    async def in_this_thread(function: Callable[..., Any], *args: Any) -> Any:
        return await sync_to_async(function, thread_sensitive=True)(*args)

    async def read(self: FutureReader, request_id: str) -> Future | None:
        found = Future.objects.defer("payload").filter(pk=request_id)
        return await in_this_thread(found.first)

    async def bulk_in_this_thread(owner: object, function: Callable[..., Any], *args: Any) -> Any:
        return await in_this_thread(function, *args)

    for module in (async_view, answers, threads):
        monkeypatch.setattr(module, "in_database_thread", in_this_thread)
    for bulk in (async_view, dispatch):
        monkeypatch.setattr(bulk, "in_bulk_thread", bulk_in_this_thread)
    monkeypatch.setattr(async_view, "in_storage_thread", bulk_in_this_thread)
    monkeypatch.setattr(FutureReader, "read", read)
    return ApiClient(local_client(raise_request_exception=False))


@pytest.fixture(scope="session")
def custom_loss_process() -> Iterator[Any]:
    """The process that computes custom losses; one for all tests, for it takes seconds to start.

    It has time: a test of its limits sets one.
    """
    from training.engine.custom_loss.process import CustomLossProcess  # imports torch

    process = CustomLossProcess(cpu_seconds=LONG_SECONDS, wall_seconds=LONG_SECONDS)
    process.wait_until_ready()
    yield process
    process.close()


@pytest.fixture
def served_api(transactional_db: None) -> Iterator[ApiClient]:
    """The API with its own threads and connections, and a live worker beside it."""
    stopping, worker = threading.Event(), InProcessWorker()

    def serve() -> None:
        bell = PostgresBroker(list_key=worker.worker.queue)
        try:
            while not stopping.is_set():
                worker()
                bell.wait(0.05)
        finally:
            connections.close_all()

    thread = threading.Thread(target=serve, name="worker")
    try:
        thread.start()
        yield ApiClient(local_client(raise_request_exception=False))
    finally:
        stopping.set()
        thread.join()
        worker.die()
