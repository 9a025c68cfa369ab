"""A worker of two ranks under ``up``: it trains like any other, and survives the loss of a rank."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server import Server
from tests.tiny_model import make_tiny_model
from tests.waiting import wait_for

pytestmark = pytest.mark.acceptance

STEPS = 6

CONFIG = """
[[base_model]]
name = "tiny"
path = "{folder}"
device = "cpu"
dtype = "float32"
tp_size = {tp_size}
fsdp_size = {fsdp_size}
"""


def follower_pid(server: Server) -> int:
    [pid] = [p.pid for p in server.processes() if "training.engine.group.follower" in p.command]
    return pid


def ranks(server: Server) -> list[int]:
    return [server.worker_pid(), follower_pid(server)]


def losses(server: Server, ids: list[str]) -> list[Any]:
    return [result["loss"] for result in server.results(ids)[::2]]


@pytest.fixture(scope="module", params=["tp_size", "fsdp_size"])
def group_server(
    request: pytest.FixtureRequest,
    start_server: Callable[..., Server],
    tmp_path_factory: pytest.TempPathFactory,
) -> Server:
    folder = tmp_path_factory.mktemp("group")
    sizes = {"tp_size": 1, "fsdp_size": 1, request.param: 2}
    config = folder / "models.toml"
    config.write_text(CONFIG.format(folder=make_tiny_model(folder / "tiny"), **sizes))
    return start_server(
        TINKERAPI_CONFIG=str(config), TINKERAPI_NUM_THREADS="1", TINKERAPI_HANG_SECONDS="20"
    )


def test_a_run_survives_the_loss_of_either_rank_and_a_hanging_one(group_server: Server) -> None:
    server = group_server
    server.post("/api/v1/add_lora", model_id="calm", rank=4, seed=1)
    expected = losses(server, server.submit_steps("calm", STEPS, learning_rate=0.01))
    assert expected[-1] < expected[0]

    server.post("/api/v1/add_lora", model_id="disturbed", rank=4, seed=1)
    found: list[Any] = []
    for place, number in ((1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)):
        before = ranks(server)
        ids = server.submit_steps("disturbed", 1, learning_rate=0.01)
        os.kill(before[place], number)
        ids += server.submit_steps("disturbed", 1, learning_rate=0.01)
        found += losses(server, ids)
        wait_for(lambda gone=before: not any(Path(f"/proc/{pid}").exists() for pid in gone))
        wait_for(server.is_ready)
    assert found == expected
    failed = "CrashedWorker"
    assert failed not in server.log()

    server.stop()
    assert not server.processes()
