"""A worker's memory for adapters, and the part that remains when nobody uses them any more.

Clients as the tinker SDK's come one after another: each opens a session, makes a model of rank 32,
trains it, samples from it as it is and from weights that it saved, and finishes its session. The
worker's resident memory is read when it is ready, while the sessions are there, and once it has
been idle after the last one finished. The first client is measured too: what its passes leave
behind is no adapter's.

    python tests/benchmarks/adapter_memory.py [--model-folder PATH]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.report import Report, at_most, results_option
from tests.benchmarks.served_model import served
from tests.server import Server

RANK = 32
STEPS = 2
TOKENS = 64  # of each of the datums of a pass
DATUMS = 1
IDLE_SECONDS = 60.0  # in which a worker gives memory back
LOOK_SECONDS = 2.0
MEBIBYTE = 2**20


@dataclass
class SdkClient:
    """One session with one model, in the JSON of the SDK's first versions."""

    server: Server
    session_id: str = ""
    _seq_id: int = 0

    @property
    def model_id(self) -> str:
        return f"{self.session_id}:train:0"

    def use_a_model(self, base_model: str) -> None:
        """Make one, train it, sample from it and from its saved weights."""
        made = self.server.post(
            "/api/v1/create_session", tags=[], user_metadata={}, sdk_version="0.20.0"
        )
        self.session_id = made.json()["session_id"]
        self._ask(
            "create_model",
            session_id=self.session_id,
            model_seq_id=0,
            base_model=base_model,
            lora_config={"rank": RANK},
        )
        data = [_datum(seed) for seed in range(DATUMS)]
        for _ in range(STEPS):
            self._train(
                "forward_backward",
                forward_backward_input={"data": data, "loss_fn": "cross_entropy"},
            )
            self._train("optim_step", adam_params={"learning_rate": 1e-4})
        saved = self._train("save_weights_for_sampler", sampling_session_seq_id=0)
        self._ask(
            "asample",
            sampling_session_id=saved["sampling_session_id"],
            seq_id=0,
            prompt={"chunks": [{"type": "encoded_text", "tokens": list(range(100, 132))}]},
            sampling_params={"max_tokens": 4},
            num_samples=2,
        )

    def finish(self) -> None:
        path = f"/api/v1/sessions/{self.session_id}/finish"
        self.server.post(path, reason={"type": "success"}).raise_for_status()

    def _train(self, verb: str, **fields: Any) -> dict[str, Any]:
        self._seq_id += 1
        return self._ask(verb, model_id=self.model_id, seq_id=self._seq_id, **fields)

    def _ask(self, verb: str, **fields: Any) -> dict[str, Any]:
        """Ask for something and wait for its result."""
        asked = self.server.post(f"/api/v1/{verb}", **fields)
        asked.raise_for_status()
        answer = self.server.retrieve(asked.json()["request_id"])
        if answer.status_code != 200:
            raise AssertionError(f"{verb}: {answer.text}")
        result: dict[str, Any] = answer.json()
        return result


def _datum(seed: int) -> dict[str, Any]:
    tokens = [(seed * 7919 + i * 31) % 40000 for i in range(TOKENS + 1)]
    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens[:-1]}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": tokens[1:], "dtype": "int64"},
            "weights": {"data": [1.0] * TOKENS, "dtype": "float32"},
        },
    }


def worker_bytes(server: Server) -> int:
    """Resident memory of the process that holds the model."""
    pid = server.worker_pid()
    return next(item.memory_bytes for item in server.processes() if item.pid == pid)


def idle_bytes(server: Server) -> int:
    """The smallest memory while there are no requests."""
    least, deadline = worker_bytes(server), time.monotonic() + IDLE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
        least = min(least, worker_bytes(server))
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description="memory of a worker's adapters")
    parser.add_argument("--model", choices=("tiny", "default"), default="default")
    parser.add_argument("--model-folder", type=Path, help="of the default model, if it is prepared")
    parser.add_argument("--runs", type=int, default=40)
    results_option(parser)
    options = parser.parse_args()
    report = Report(
        benchmark="adapter_memory",
        settings={
            "model": options.model,
            "runs": options.runs,
            "rank": RANK,
            "datums": f"{DATUMS} of {TOKENS} tokens",
        },
    )
    with (
        tempfile.TemporaryDirectory(prefix="tinkerapi-bench-") as folder,
        served(options.model, Path(folder), options.model_folder) as (server, _),
    ):
        capabilities = requests.get(f"{server.url}/api/v1/get_server_capabilities", timeout=30)
        base_model = capabilities.json()["supported_models"][0]["model_name"]
        base = worker_bytes(server)
        clients = [SdkClient(server) for _ in range(options.runs)]
        clients[0].use_a_model(base_model)
        first = worker_bytes(server)
        for client in clients[1:]:
            client.use_a_model(base_model)
        most = worker_bytes(server)
        for client in clients:
            client.finish()
        left = idle_bytes(server)
    for name, size in (
        ("worker, ready", base),
        ("worker, one run used", first),
        (f"worker, {options.runs} runs used", most),
        (f"worker, idle after {options.runs} sessions were finished", left),
    ):
        report.add(name, [size / MEBIBYTE], unit="MiB")
    report.add(
        "left above a worker that is ready",
        [(left - base) / MEBIBYTE],
        unit="MiB",
        goal=at_most(1000 * 1000 * 1000 / MEBIBYTE),
    )
    report.finish(options.results)


if __name__ == "__main__":
    main()
