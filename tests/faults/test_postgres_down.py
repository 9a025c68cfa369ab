"""Postgres goes away under a working server and comes back: nobody loses anything."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.platform.processes import wait_for
from tests.server import Json, Server, free_port
from tests.tiny_model import make_tiny_model
from tinkerapi.postgres import DATABASE_NAME, EmbeddedPostgres

pytestmark = pytest.mark.acceptance

CONVERSATION = [{"role": "user", "content": "test"}, {"role": "assistant", "content": "passed"}]
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


def submit(server: Server, model_id: str, steps: int) -> list[str]:
    ids = []
    for _ in range(steps):
        for path, fields in (
            ("/api/v1/forward_backward_async", {"data": [CONVERSATION]}),
            ("/api/v1/optim_step_async", {"adam_params": {"learning_rate": 0.1}}),
        ):
            answer = server.post(path, model_id=model_id, **fields)
            assert answer.status_code == 200, answer.text
            ids.append(answer.json()["request_id"])
    return ids


def metrics(server: Server, ids: list[str]) -> list[Json]:
    answers = [server.retrieve(request_id) for request_id in ids]
    assert [answer.status_code for answer in answers] == [200] * len(ids)
    return [answer.json()["metrics"] for answer in answers]


def test_nothing_is_lost_while_postgres_is_away(server: Server, postgres: EmbeddedPostgres) -> None:
    unbroken = metrics(server, submit(server, "unbroken", 20))
    ids = submit(server, "broken", 15)  # much of it is still to be done
    with ThreadPoolExecutor(CLIENTS + 1) as clients:
        parked = clients.submit(server.post, "/retrieve_future", request_id=ids[-1], wait=1)
        postgres.stop(hurry=lambda: True)
        refused = list(clients.map(lambda _: try_to_submit(server), range(CLIENTS)))
        assert parked.result().status_code in (200, 202, 503)
    assert {answer.status_code for answer in refused} == {503}
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in refused)
    assert requests.get(f"{server.url}/healthz", timeout=5).status_code == 200
    assert not server.is_ready()

    postgres.start()
    wait_for(server.is_ready, seconds=90)
    ids += submit(server, "broken", 5)
    assert metrics(server, ids) == unbroken


def try_to_submit(server: Server) -> requests.Response:
    return server.post(
        "/api/v1/optim_step_async", model_id="broken", adam_params={"learning_rate": 0.1}
    )
