"""Postgres goes down under a working server and comes back: nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.server import Json, Server, free_port
from tests.tiny_model import make_tiny_model
from tests.waiting import LONG_SECONDS, wait_for
from tinkerapi.server.postgres import DATABASE_NAME, EmbeddedPostgres

pytestmark = pytest.mark.acceptance

CLIENTS = 16


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """A Postgres that no supervisor starts again."""
    with EmbeddedPostgres(tmp_path / "postgres", durable=False) as postgres:
        yield postgres


@pytest.fixture
def server(tmp_path: Path, postgres: EmbeddedPostgres) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(
        folder,
        free_port(),
        {
            "DATABASE_URL": f"postgresql://postgres@/{DATABASE_NAME}?host={postgres.socket_folder}",
            "TINKERAPI_BASE_MODEL": str(make_tiny_model(tmp_path / "tiny")),
            "TINKERAPI_DTYPE": "float32",
            "TINKERAPI_NUM_THREADS": "1",
        },
    )
    server.start()
    yield server
    server.stop()


def metrics(server: Server, ids: list[str]) -> list[Json]:
    return [result["metrics"] for result in server.results(ids)]


def test_nothing_is_lost_while_postgres_is_away(server: Server, postgres: EmbeddedPostgres) -> None:
    unbroken = metrics(server, server.submit_steps("unbroken", 20, learning_rate=0.1))
    ids = server.submit_steps("broken", 15, learning_rate=0.1)  # much of it is still to be done
    with ThreadPoolExecutor(CLIENTS + 1) as clients:
        parked = clients.submit(server.post, "/retrieve_future", request_id=ids[-1], wait=1)
        postgres.stop(hurry=lambda: True)
        refused = list(clients.map(lambda _: try_to_submit(server), range(CLIENTS)))
        assert parked.result().status_code in (200, 202, 503)
    assert {answer.status_code for answer in refused} == {503}
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in refused)
    assert requests.get(f"{server.url}/healthz", timeout=LONG_SECONDS).status_code == 200
    assert not server.is_ready()

    postgres.start()
    wait_for(server.is_ready)
    ids += server.submit_steps("broken", 5, learning_rate=0.1)
    assert metrics(server, ids) == unbroken


def try_to_submit(server: Server) -> requests.Response:
    return server.post(
        "/api/v1/optim_step_async", model_id="broken", adam_params={"learning_rate": 0.1}
    )
