"""What every test may count on: a real Postgres, and a data folder that is thrown away."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.conf import settings

from tinkerapi.postgres import EmbeddedPostgres


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
