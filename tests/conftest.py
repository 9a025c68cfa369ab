"""What every test may count on: a real Postgres, and a data folder that is thrown away."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from django.conf import settings

from futures.workers import worker_start
from tinkerapi.postgres import EmbeddedPostgres
from training.base_models import base_model_get
from training.engine.fake import FakeEngine
from training.worker.loop import WorkLoop


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


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the data folder of this run."""
    shutil.rmtree(Path(settings.DATA_DIR), ignore_errors=True)


class InProcessWorker:
    """The real work loop on a fake engine, stepped by the test instead of by doorbells."""

    def __init__(self, engine: FakeEngine | None = None) -> None:
        self.engine = engine or FakeEngine()
        self.worker = worker_start(queue=base_model_get(None).queue, figures={})
        self.loop = WorkLoop(
            self.engine, self.worker, stopping=lambda: False, bell_rang=lambda: False
        )

    def __call__(self) -> None:
        """Work until nothing may run."""
        self.loop.run_until_idle()

    def die(self) -> None:
        """Leave as after SIGKILL: nothing is given back, only the lock is gone."""
        if self.worker.queue_lock is not None:
            self.worker.queue_lock.release()


@pytest.fixture
def start_worker(db: None) -> Iterator[Callable[..., InProcessWorker]]:
    """``start_worker()``: a new worker life; ``work = start_worker(); work()`` runs what waits."""
    workers: list[InProcessWorker] = []

    def start(engine: FakeEngine | None = None) -> InProcessWorker:
        if workers:
            workers[-1].die()
        workers.append(InProcessWorker(engine))
        return workers[-1]

    yield start
    for worker in workers:
        worker.die()


@pytest.fixture
def work(start_worker: Callable[..., InProcessWorker]) -> InProcessWorker:
    """A worker that is live; ``work()`` runs everything that may run."""
    return start_worker()
