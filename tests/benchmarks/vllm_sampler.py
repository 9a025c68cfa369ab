"""What our way to a vLLM server costs: throughput beside vLLM alone, and publishing a version.

Throughput: a server with ``sampler = "vllm"`` gets 64 requests at once, as clients send them; then
the same vLLM server gets the same 64 requests directly from the same client, for the same model, or
the other way round, in turns, so that a busy machine slows both. Everything shares the machine's
cores: web, worker, Postgres, clients and vLLM. So the processor time of each is kept too, and a
second ratio is of turns in which vLLM has one half of the cores to itself, in both: the requests'
way through us without the cores that it takes from vLLM.

The default model is sampled as such models are. The tiny one has next to nothing to compute, so its
ratio is that of handling requests.

Publishing, with the tiny model: the time from publishing weights that the server has never seen to
the first token sampled from them, in this process, with the same vLLM server.

    tests/vllm_suite.sh --benchmark

or, with that environment's Python in TINKERAPI_TEST_VLLM_PYTHON,

    python tests/benchmarks/vllm_sampler.py [--folder FOLDER] [--model tiny]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from tests.benchmarks.report import Report, at_least, at_most, results_option
from tests.benchmarks.served_model import DEFAULT_MODEL, served
from tests.benchmarks.vllm_processes import (
    CLIENT,
    OURS,
    PARTS,
    THEIRS,
    vllm_on_cores_of_its_own,
)
from tests.benchmarks.vllm_turns import (
    DEFAULT,
    REQUESTS,
    TINY,
    Workload,
    connection_of,
    measured,
)
from tests.engine.contract.conftest import step
from tests.engine.vllm.engines import engine_with_server
from tests.engine.vllm.real import CPU_ENVIRONMENT, vllm_python
from tests.server import Server
from tests.tiny_model import make_wide_model
from training.engine.interface import SampleJob, SampleOutput
from training.engine.torch.loading import load_base_model
from training.types import LoraConfig, SamplingParams
from training.vllm_server import VllmConnection

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
max_lora_rank = {rank}
wait_seconds = 900
"""


def throughput(
    report: Report, server: Server, workload: Workload, folder: Path, repetitions: int
) -> None:
    measured(server, workload, folder, 0)  # warm
    for is_apart in (False, True):
        where = ", vLLM on cores of its own" if is_apart else ""
        with vllm_on_cores_of_its_own(server) if is_apart else nullcontext():
            numbers = range(repetitions * is_apart + 1, repetitions * (is_apart + 1) + 1)
            turns = [measured(server, workload, folder, number) for number in numbers]
        report.add(
            f"{workload}{where}: throughput through us against alone",
            [turn.alone / turn.through_us for turn in turns],
            unit="x",
            goal=None if is_apart else at_least(0.9),
        )
        if is_apart:
            continue
        tokens = REQUESTS * workload.new_tokens
        report.add(
            f"{workload}: tokens through us", [tokens / t.through_us for t in turns], unit="1/s"
        )
        report.add(
            f"{workload}: tokens of vLLM alone", [tokens / t.alone for t in turns], unit="1/s"
        )
        for way, useds in (
            ("through us", [turn.used_through_us for turn in turns]),
            ("alone", [turn.used_alone for turn in turns]),
        ):
            for part in (OURS, *PARTS, THEIRS, CLIENT) if way == "through us" else (THEIRS, CLIENT):
                report.add(
                    f"{workload}, {way}: processor time of {part}",
                    [1000 * used[part] / REQUESTS for used in useds],
                    unit="ms/request",
                )


def measure(report: Report, workload: Workload, options: argparse.Namespace) -> None:
    """Start a server with a vLLM server beside it, and measure."""
    with tempfile.TemporaryDirectory(prefix="vllm-") as directory:
        data_dir = Path(directory) / "data"
        data_dir.mkdir()
        folder: Path | None = options.folder
        if workload is TINY:
            folder = make_wide_model(Path(directory) / "tiny")
        config = Path(directory) / "tinkerapi.toml"
        config.write_text(
            CONFIG.format(
                path=folder or DEFAULT_MODEL,
                dtype=workload.dtype,
                python=vllm_python(),
                requests=REQUESTS,
                rank=workload.max_lora_rank,
                environment=", ".join(f'{name} = "{text}"' for name, text in CPU_ENVIRONMENT),
            )
        )
        settings = {
            "TINKERAPI_CONFIG": str(config),
            "TINKERAPI_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        with served("as configured", data_dir, None, **settings) as (server, made):
            wait_for_vllm(server)
            folder = folder or made
            throughput(report, server, workload, folder, options.repetitions)
            if workload is TINY:
                publishing(report, folder, connection_of(server), 4 * options.repetitions)


def wait_for_vllm(server: Server) -> None:
    """Return as soon as the worker uses the server."""
    deadline = time.monotonic() + WARM_UP_SECONDS
    log = server.data_dir / "logs" / "engine-base.log"
    while "the vLLM server is ready" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.5)


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
        engine.trainer.create_adapter("a", LoraConfig(rank=TINY.max_lora_rank, seed=1))
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
    parser.add_argument("--model", choices=("tiny", "default"), help="only this one")
    parser.add_argument("--folder", type=Path, help="of the default model, if it was made before")
    parser.add_argument("--repetitions", type=int, default=5)
    results_option(parser)
    options = parser.parse_args()
    report = Report(
        benchmark="vllm_sampler",
        settings={
            "requests at once": REQUESTS,
            "threads of worker and vLLM": 1,
            "vLLM": "0.32.0 (CPU)",
        },
    )
    for workload in (DEFAULT, TINY):
        if options.model in (None, workload.model):
            measure(report, workload, options)
    report.finish(options.results)


if __name__ == "__main__":
    main()
