"""A whole server whose samples come from vLLM: started by ``up``, killed in the middle of requests.

``tests/vllm_suite.sh`` runs it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.engine.vllm.real import vllm_python
from tests.platform.processes import is_running
from tests.server import Server
from tests.tiny_model import make_wide_model
from tests.waiting import LONG_SECONDS, wait_for

pytestmark = pytest.mark.vllm

REQUESTS = 50
START_SECONDS = 600.0
CONFIG = """
[[base_model]]
name = "tiny"
path = "./tiny"
dtype = "float32"
sampler = "vllm"

[base_model.vllm]
python = "{python}"
arguments = ["--enforce-eager"]
environment = {{ VLLM_CPU_KVCACHE_SPACE = "1", VLLM_CPU_OMP_THREADS_BIND = "nobind", \
OMP_NUM_THREADS = "1" }}
max_loras = 2
max_lora_rank = 8
max_sequences = 16
wait_seconds = 900
"""


def doctor(server: Server) -> str:
    return server.manage("doctor", "--no-color").stdout


def wait_for_vllm(server: Server) -> None:
    """Wait until the worker says that it uses the server."""
    wait_for(lambda: "the vLLM server is ready" in log(server), START_SECONDS)


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    folder = tmp_path_factory.mktemp("vllm")
    make_wide_model(folder / "tiny")
    (folder / "tinkerapi.toml").write_text(CONFIG.format(python=vllm_python()))
    server = start_server(
        TINKERAPI_CONFIG=str(folder / "tinkerapi.toml"), TINKERAPI_NUM_THREADS="1"
    )
    wait_for_vllm(server)
    server.post("/api/v1/add_lora", model_id="run", rank=4, seed=1)
    server.results(server.submit_steps("run", 2, learning_rate=0.1))
    wait_for(lambda: "vLLM: ready" in doctor(server), LONG_SECONDS)  # it is in a heartbeat
    return server


def fields(seed: int) -> dict[str, Any]:
    """Every second request samples the run, the others the base model."""
    whose = {"model_id": "run"} if seed % 2 else {"base_model": "tiny"}
    return {
        **whose,
        "prompt": f"request {seed}",
        "sampling_params": {"max_tokens": 300, "seed": seed, "stop": []},
    }


def sequences(answer: requests.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()["sequences"]


def engine_pid(server: Server) -> int:
    (pid,) = [item.pid for item in server.processes() if "EngineCore" in item.command]
    return pid


def log(server: Server) -> str:
    return (server.data_dir / "logs" / "engine-tiny.log").read_text()


def test_the_engine_dies_in_the_middle_of_fifty_requests_and_all_are_answered_once(
    server: Server,
) -> None:
    expected = [sequences(server.post("/api/v1/sample", **fields(seed))) for seed in range(2)]
    ids = []
    for seed in range(REQUESTS):
        answer = server.post("/api/v1/asample", **fields(seed))
        assert answer.status_code == 200, answer.text
        ids.append(answer.json()["request_id"])
    server.retrieve(ids[3], seconds=START_SECONDS)  # some are answered, the others are there
    killed = engine_pid(server)
    os.kill(killed, signal.SIGKILL)
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda name: server.retrieve(name, seconds=START_SECONDS).json(), ids)
        )
    assert all(len(answer["sequences"]) == 1 for answer in answers), answers
    assert [answer["sequences"] for answer in answers[:2]] == expected
    # Asked again, each is the same answer: none was computed twice into another.
    again = [server.retrieve(name).json() for name in ids]
    assert again == answers
    assert engine_pid(server) != killed
    assert "the vLLM server is lost" in log(server)
    assert "the built-in sampler takes a job" not in log(server)


def test_the_worker_may_be_killed_while_its_requests_are_in_the_server(server: Server) -> None:
    expected = sequences(server.post("/api/v1/sample", **fields(1)))
    ids = [server.post("/api/v1/asample", **fields(1)).json()["request_id"] for _ in range(8)]
    os.kill(server.worker_pid(), signal.SIGKILL)
    answers = [server.retrieve(name, seconds=LONG_SECONDS).json() for name in ids]
    assert [answer["sequences"] for answer in answers] == [expected] * 8


def test_nothing_is_left_when_the_server_has_stopped(server: Server, tmp_path: Path) -> None:
    pids = [item.pid for item in server.processes()]
    server.stop()
    assert [pid for pid in pids if is_running(pid)] == []
    server.start()
    wait_for(
        lambda: any("EngineCore" in item.command for item in server.processes()), START_SECONDS
    )
    pids = [item.pid for item in server.processes()]
    server.kill()
    wait_for(lambda: not any(map(is_running, pids)))
