"""What our way to a vLLM server costs: throughput beside vLLM alone, and publishing a version.

Throughput: a server with ``sampler = "vllm"`` gets 64 requests at once, each a prompt of 32 tokens
that is continued by 32, as clients send them; then the same vLLM server gets the same 64 requests
directly, in turns, so that a busy machine slows both. Everything shares the machine's cores: web,
worker, Postgres, clients and vLLM.

Publishing: the time from publishing weights that the server has never seen to the first token
sampled from them, in this process, with the same vLLM server.

    tests/vllm_suite.sh --benchmark

or, with that environment's Python in TINKERAPI_TEST_VLLM_PYTHON,

    python tests/benchmarks/vllm_sampler.py [--model tiny]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import httpx2
import numpy as np

from tests.benchmarks.report import Report, at_least, at_most, results_option
from tests.benchmarks.served_model import served
from tests.engine.contract.conftest import step
from tests.engine.vllm.engines import engine_with_server
from tests.engine.vllm.real import CPU_ENVIRONMENT, vllm_python
from tests.server import Server
from tests.tiny_model import make_wide_model
from training.engine.interface import SampleJob, SampleOutput
from training.engine.torch.loading import load_base_model
from training.engine.vllm.requests import request_body
from training.types import LoraConfig, SamplingParams
from training.vllm_server import VllmConnection

REQUESTS = 64
PROMPT_TOKENS = 32
NEW_TOKENS = 32
WARM_UP_SECONDS = 600.0

CONFIG = """
[[base_model]]
name = "base"
path = "{path}"
dtype = "{dtype}"
sampler = "vllm"

[base_model.vllm]
python = "{python}"
arguments = ["--enforce-eager"]
environment = {{ {environment} }}
max_sequences = {requests}
max_lora_rank = 8
wait_seconds = 900
"""


def prompts(vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return rng.integers(3, vocab_size, (REQUESTS, PROMPT_TOKENS)).tolist()


async def through_us(server: Server, vocab_size: int) -> float:
    """Seconds until all are answered."""
    async with httpx2.AsyncClient(timeout=None, trust_env=False) as http:

        async def one(seed: int, prompt: list[int]) -> None:
            answer = await http.post(
                f"{server.url}/api/v1/sample",
                json={
                    "base_model": "base",
                    "prompt": prompt,
                    "sampling_params": {
                        "max_tokens": NEW_TOKENS,
                        "seed": seed,
                        "stop": [],
                    },
                },
            )
            sequences = answer.json()["sequences"]
            assert len(sequences[0]["tokens"]) == NEW_TOKENS, answer.text

        begin = time.monotonic()
        await asyncio.gather(*(one(*pair) for pair in enumerate(prompts(vocab_size))))
        return time.monotonic() - begin


async def alone(server: Server, vocab_size: int) -> float:
    """The same requests to the same vLLM server, with the same seeds and log-probabilities."""
    connection = connection_of(server)
    headers = {"Authorization": f"Bearer {connection.key}"}
    async with httpx2.AsyncClient(timeout=None, trust_env=False, headers=headers) as http:

        async def one(seed: int, prompt: list[int]) -> None:
            job = SampleJob(
                prompt=np.array(prompt, np.int32), sampling_params=SamplingParams(seed=seed)
            )
            body = request_body(
                job,
                0,
                request_id=f"alone-{seed}",
                model="base",
                max_tokens=NEW_TOKENS,
                end_token_ids=(),
                salt="alone",
            )
            answer = await http.post(f"{connection.address}/inference/v1/generate", json=body)
            assert len(answer.json()["choices"][0]["token_ids"]) == NEW_TOKENS, answer.text

        begin = time.monotonic()
        await asyncio.gather(*(one(*pair) for pair in enumerate(prompts(vocab_size))))
        return time.monotonic() - begin


def connection_of(server: Server) -> VllmConnection:
    (file,) = (server.data_dir / "vllm").glob("*/server.*.json")
    content = json.loads(file.read_text())
    return VllmConnection(address=content["address"], key=content["key"])


def wait_for_vllm(server: Server) -> None:
    """Return as soon as the worker uses the server."""
    deadline = time.monotonic() + WARM_UP_SECONDS
    log = server.data_dir / "logs" / "engine-base.log"
    while "the vLLM server is ready" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.5)


def throughput(report: Report, model: str, folder: Path | None, repetitions: int) -> None:
    with tempfile.TemporaryDirectory(prefix="vllm-") as directory:
        data_dir = Path(directory) / "data"
        data_dir.mkdir()
        if model == "tiny":
            folder = make_wide_model(Path(directory) / "tiny")
        assert folder is not None, "--folder is needed for the default model"
        vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
        config = Path(directory) / "tinkerapi.toml"
        config.write_text(
            CONFIG.format(
                path=folder,
                dtype="float32" if model == "tiny" else "bfloat16",
                python=vllm_python(),
                requests=REQUESTS,
                environment=", ".join(f'{name} = "{text}"' for name, text in CPU_ENVIRONMENT),
            )
        )
        settings = {
            "TINKERAPI_CONFIG": str(config),
            "TINKERAPI_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        with served("as configured", data_dir, None, **settings) as (server, _):
            wait_for_vllm(server)
            publishing(report, folder, connection_of(server), 4 * repetitions)
            asyncio.run(through_us(server, vocab_size))
            asyncio.run(alone(server, vocab_size))
            pairs = [
                (
                    asyncio.run(through_us(server, vocab_size)),
                    asyncio.run(alone(server, vocab_size)),
                )
                for _ in range(repetitions)
            ]
    tokens = REQUESTS * NEW_TOKENS
    report.add("tokens through us", [tokens / ours for ours, _ in pairs], unit="1/s")
    report.add("tokens of vLLM alone", [tokens / theirs for _, theirs in pairs], unit="1/s")
    ratios = [theirs / ours for ours, theirs in pairs]
    report.add("throughput through us against alone", ratios, unit="x", goal=at_least(0.9))


@dataclass
class Started:
    """The server that ``up`` has started."""

    connection: VllmConnection


def publishing(report: Report, folder: Path, connection: VllmConnection, repetitions: int) -> None:
    with tempfile.TemporaryDirectory(prefix="vllm-") as directory:
        base_model = load_base_model(str(folder), device="cpu")
        engine = engine_with_server(
            base_model, Started(connection), Path(directory) / "server", max_loras=8
        )
        engine.trainer.create_adapter("a", LoraConfig(rank=8, seed=1))
        job: dict[str, Any] = {
            "prompt": np.arange(3, 35, dtype=np.int32),
            "sampling_params": SamplingParams(max_tokens=1, seed=1),
        }

        def first_token(version: str | None) -> float:
            begin = time.monotonic()
            if version is not None:
                captured = engine.trainer.capture_adapter("a", with_optimizer=False)
                engine.sampler.publish(version, captured)
            engine.sampler.submit("one", SampleJob(**job, version=version))
            while not (found := engine.sampler.poll(60)):
                pass
            assert isinstance(found["one"], SampleOutput), found
            return 1000 * (time.monotonic() - begin)

        try:
            first_token(None)
            known, new = [], []
            for number in range(repetitions):
                step(engine.trainer, "a")
                new.append(first_token(f"v{number}"))
                known.append(first_token(f"v{number}"))
                engine.sampler.retire(f"v{number}")
            assert not engine.sampler.figures()["vllm"]["sampled_here"]
        finally:
            engine.sampler.close()
    report.add(
        "first token of a new version, from its publishing", new, unit="ms", goal=at_most(200)
    )
    report.add("the same of a version that is loaded", known, unit="ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("tiny", "default"), default="tiny")
    parser.add_argument("--folder", type=Path, help="of the default model, as `up` makes it")
    parser.add_argument("--repetitions", type=int, default=5)
    results_option(parser)
    options = parser.parse_args()
    vllm_version = "0.32.0 (CPU)"
    report = Report(
        benchmark="vllm_sampler",
        settings={
            "model": options.model,
            "requests at once": REQUESTS,
            "prompt tokens": PROMPT_TOKENS,
            "new tokens": NEW_TOKENS,
            "threads of worker and vLLM": 1,
            "vLLM": vllm_version,
        },
    )
    throughput(report, options.model, options.folder, options.repetitions)
    report.finish(options.results)


if __name__ == "__main__":
    main()
