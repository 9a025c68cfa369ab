"""Workers and server are restarted one by one while users train.

No request is lost, and no bit differs.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests

from tests.acceptance.official_sdk import finish_script, start_script
from tests.server import ROOT, Server, free_port
from tests.tiny_model import make_tiny_model
from tests.waiting import LONG_SECONDS, wait_for
from tinkerapi.server.postgres import DATABASE_NAME, EmbeddedPostgres

pytestmark = pytest.mark.acceptance

USERS = 4

_TRAIN = """
# Steps until the file exists: two requests each, and a sample of saved weights every fourth.
model = new_model(seed=1)
losses, sampled, requests = [], [], 0
while not os.path.exists(os.environ["STOP"]):
    future = model.forward_backward([datum([5, 6, 7, 8, 9, 10])], "cross_entropy")
    model.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    losses.append(future.result().metrics["loss:sum"])
    requests += 2
    if len(losses) % 4 == 0:
        client = model.save_weights_and_get_sampling_client()
        result = client.sample(
            prompt=types.ModelInput.from_ints([5, 6]), num_samples=1,
            sampling_params=types.SamplingParams(max_tokens=4, seed=3, stop=[]),
        ).result()
        sampled.append(list(result.sequences[0].tokens))
report(losses=losses, sampled=sampled, requests=requests, model_id=model.model_id)
"""


class Installation:
    """A server and a joined worker on a Postgres of their own."""

    def __init__(self, folder: Path, postgres: EmbeddedPostgres) -> None:
        self.database = f"postgresql://postgres@/{DATABASE_NAME}?host={postgres.socket_folder}"
        self.server = Server(
            folder / "server",
            free_port(),
            {
                "DATABASE_URL": self.database,
                "TINKERAPI_BASE_MODEL": str(make_tiny_model(folder / "tiny")),
                "TINKERAPI_NUM_THREADS": "1",
            },
        )
        self.joined: subprocess.Popen[bytes] | None = None

    def join(self) -> None:
        self.joined = subprocess.Popen(
            [sys.executable, "manage.py", "worker", "--join"],
            cwd=ROOT,
            env=self.server.full_environment(),
        )

    def leave(self) -> None:
        assert self.joined is not None
        self.joined.send_signal(signal.SIGTERM)
        assert self.joined.wait(LONG_SECONDS) == 0
        self.joined = None

    def live_workers(self) -> int:
        answer = requests.get(f"{self.server.url}/readyz", timeout=LONG_SECONDS).json()
        return sum(answer["workers"].values())

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database) as connection:
            return connection.execute(query, values).fetchall()

    def wait_for_steps(self, more: int = 4 * USERS) -> None:
        """Return when ``more`` further steps are finished."""
        query = "SELECT count(*) FROM futures_future WHERE kind = 'optim_step' AND state = 'ready'"
        begin = self.rows(query)[0][0]
        wait_for(lambda: self.rows(query)[0][0] >= begin + more)


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    with EmbeddedPostgres(tmp_path / "postgres", durable=False) as postgres:
        installation = Installation(tmp_path, postgres)
        installation.server.start()
        installation.join()
        wait_for(lambda: installation.live_workers() == 2)
        yield installation
        if installation.joined is not None:
            installation.leave()
        installation.server.stop()


def test_a_restart_of_each_part_in_turn_loses_no_request(
    installation: Installation, tmp_path: Path
) -> None:
    stop = tmp_path / "stop"
    scripts = [start_script(installation.server, _TRAIN, STOP=str(stop)) for _ in range(USERS)]
    try:
        installation.wait_for_steps()
        for _ in range(2):  # the joined worker, twice
            installation.leave()
            installation.wait_for_steps()
            installation.join()
            wait_for(lambda: installation.live_workers() == 2)
            installation.wait_for_steps()
        installation.server.stop()  # web and the other worker
        installation.server.start()
        wait_for(lambda: installation.live_workers() == 2)
        installation.wait_for_steps()
    finally:
        stop.touch()
    reports = [finish_script(script) for script in scripts]

    longest = max(reports, key=lambda report: len(report["losses"]))
    for report in reports:
        assert report["losses"] == longest["losses"][: len(report["losses"])]
        assert report["sampled"] == longest["sampled"][: len(report["sampled"])]
        [(count, states)] = installation.rows(
            "SELECT count(*), array_agg(DISTINCT state) FROM futures_future"
            " WHERE lane_id = %s AND kind IN ('forward_backward', 'optim_step')",
            report["model_id"],
        )
        assert (count, states) == (report["requests"], ["ready"])
    assert (
        len({worker for (worker,) in installation.rows("SELECT worker_id FROM futures_future")}) > 3
    )
    assert longest["losses"][-1] < longest["losses"][0]
