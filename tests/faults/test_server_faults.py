"""A whole server whose worker stops, or may not write: its clients see a pause or a name."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.server import Json, Server, free_port
from tests.tiny_model import make_tiny_model
from tests.waiting import LONG_SECONDS, wait_for

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(sys.platform != "linux", reason="sets another process's limits"),
]

RANK = 64  # 200 KiB of weights: more than the limit below, which the log stays under
LIMIT_BYTES = 100_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("faults")
    server = Server(
        folder,
        free_port(),
        {
            "TINKERAPI_BASE_MODEL": str(make_tiny_model(folder / "tiny")),
            "TINKERAPI_DTYPE": "float32",
            "TINKERAPI_NUM_THREADS": "1",
            "TINKERAPI_HANG_SECONDS": "15",
            "TINKERAPI_SNAPSHOT_SECONDS": "0",
        },
    )
    server.start()
    yield server
    server.stop()


def metrics(server: Server, ids: list[str]) -> list[Json]:
    return [result["metrics"] for result in server.results(ids)]


def create(server: Server, model_id: str) -> None:
    answer = server.post("/api/v1/add_lora", model_id=model_id, rank=RANK, seed=7)
    assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def unbroken(server: Server) -> list[Json]:
    """The metrics of four steps in peace."""
    create(server, "unbroken")
    ids = server.submit_steps("unbroken", 4, learning_rate=0.1)
    return metrics(server, ids)


def test_a_stopped_worker_is_replaced_and_the_run_goes_on_to_the_same_bits(
    server: Server, unbroken: list[Json]
) -> None:
    create(server, "stopped")
    ids = server.submit_steps("stopped", 1, learning_rate=0.1)
    metrics(server, ids)
    stopped = server.worker_pid()
    os.kill(stopped, signal.SIGSTOP)
    ids += server.submit_steps("stopped", 3, learning_rate=0.1)
    assert metrics(server, ids) == unbroken
    assert "made no progress for 15 s and was killed" in server.log()
    assert server.worker_pid() != stopped


def test_a_killed_worker_is_not_ready_before_its_successor_has_begun(server: Server) -> None:
    """The heartbeats of a worker that was killed are missed after half a minute only."""
    os.kill(server.worker_pid(), signal.SIGKILL)

    def missing() -> list[str] | None:
        answer = requests.get(f"{server.url}/readyz", timeout=LONG_SECONDS)
        return answer.json()["missing"] if answer.status_code == 503 else None

    assert wait_for(missing)[0].endswith(
        "The worker has ended; its requests wait for the next one."
    )
    server.wait_until("/readyz")


def test_a_worker_that_may_not_write_trains_on_and_fails_saves_by_name(
    server: Server, unbroken: list[Json]
) -> None:
    worker = server.worker_pid()
    before = resource.prlimit(worker, resource.RLIMIT_FSIZE)
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (LIMIT_BYTES, before[1]))
    create(server, "full")
    ids = server.submit_steps("full", 3, learning_rate=0.1)
    metrics(server, ids)
    log = next((server.data_dir / "logs").glob("engine-*.log"))
    wait_for(lambda: "no snapshot" in log.read_text())
    failed = server.post("/api/v1/save_weights", model_id="full", name="kept")
    assert failed.json()["error_code"] == "StorageFull", failed.text

    resource.prlimit(worker, resource.RLIMIT_FSIZE, before)
    saved = server.post("/api/v1/save_weights", model_id="full", name="kept")
    assert saved.status_code == 200, saved.text
    ids += server.submit_steps("full", 1, learning_rate=0.1)
    assert metrics(server, ids) == unbroken
    assert server.worker_pid() == worker
    assert not list(Path(server.data_dir / "snapshots").glob(".*"))
