"""A base model with two workers of ``up``; a third joins as one on another machine would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.server import ROOT, Server
from tests.tiny_model import make_tiny_model
from tests.waiting import LONG_SECONDS, wait_for
from tinkerapi.server.postgres import embedded_database

pytestmark = pytest.mark.acceptance

STEPS = 3
RUNS = 6


def live_workers(server: Server) -> int:
    answer = requests.get(f"{server.url}/readyz", timeout=LONG_SECONDS).json()
    return sum(answer["workers"].values())


def train(server: Server, model_id: str) -> list[Any]:
    """Train a run for some steps; its losses, the same for every run."""
    server.post("/api/v1/add_lora", model_id=model_id, rank=4, seed=1)
    ids = server.submit_steps(model_id, STEPS, learning_rate=0.01)
    return [result["loss"] for result in server.results(ids)[::2]]


def train_all(server: Server, names: list[str]) -> list[list[Any]]:
    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(lambda name: train(server, name), names))


class Joiner:
    """``worker --join`` beside a server, with that server's database by address."""

    def __init__(self, server: Server) -> None:
        database = embedded_database(server.data_dir)
        self.environment = {
            **server.full_environment(),
            "DATABASE_URL": f"postgresql://{database['USER']}@/{database['NAME']}"
            f"?host={database['HOST']}&port={database['PORT']}",
        }

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "manage.py", "worker", "--join", *arguments]

    def check(self, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command("--check"),
            cwd=ROOT,
            env={**self.environment, **changes},
            capture_output=True,
            text=True,
            check=False,
        )


def test_workers_share_the_runs_join_and_leave_without_a_lost_request(
    start_server: Callable[..., Server], tmp_path: Path
) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    server = start_server(
        TINKERAPI_BASE_MODEL=str(folder), TINKERAPI_WORKERS="2", TINKERAPI_NUM_THREADS="1"
    )
    wait_for(lambda: live_workers(server) == 2)
    doctor = server.manage("doctor", "--no-color")
    assert doctor.returncode == 0, doctor.stdout
    assert doctor.stdout.count("worker tiny") == 2

    expected, *others = train_all(server, [f"first-{number}" for number in range(RUNS)])
    assert all(losses == expected for losses in others)
    logs = sorted(path.name for path in (server.data_dir / "logs").glob("engine-*.log"))
    assert logs == ["engine-tiny.1.log", "engine-tiny.2.log"]

    joiner = Joiner(server)
    assert joiner.check().stdout == "this machine can join\n"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for changes, named in (
        ({"DATABASE_URL": ""}, "database: DATABASE_URL is not set"),
        ({"TINKERAPI_DATA_DIR": str(elsewhere)}, "so no server runs on it; mount the server's"),
        ({"TINKERAPI_SECRET_KEY": "another"}, "secret key: "),
        ({"TINKERAPI_DTYPE": "bfloat16"}, "dtype: bfloat16 here, auto at worker"),
    ):
        refused = joiner.check(**changes)
        assert refused.returncode == os.EX_CONFIG
        assert named in refused.stderr

    with subprocess.Popen(
        joiner.command(), cwd=ROOT, env={**joiner.environment, "TINKERAPI_WORKERS": "1"}
    ) as joined:
        wait_for(lambda: live_workers(server) == 3)
        again = train_all(server, [f"second-{number}" for number in range(RUNS)])
        with ThreadPoolExecutor(1) as pool:  # it leaves while others train
            third = pool.submit(train_all, server, [f"second-{number}" for number in range(RUNS)])
            joined.send_signal(signal.SIGTERM)
            assert joined.wait(LONG_SECONDS) == 0
        on = third.result()
    assert all(losses == expected for losses in again)
    assert all(losses == on[0] for losses in on)
    assert live_workers(server) == 2
