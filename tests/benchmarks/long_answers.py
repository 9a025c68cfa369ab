"""A group of long answers, and what another user's short samples wait beside it.

One whole server with the default model. A user asks for 16 answers of 4,096 tokens to a prompt of
500, which are not ended before; another user asks for a sample of 8 tokens every few seconds, each
with a prompt of its own. Figures are the short samples' times, alone and beside the group, the
group's tokens per second, and the worker's memory.

    python tests/benchmarks/long_answers.py [--folder MODEL_FOLDER] [--tokens 1024]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.crowd import MEBIBYTE, Memory
from tests.benchmarks.report import Report, at_most, results_option
from tests.benchmarks.served_model import base_model_name, served
from tests.server import Server

PROMPT_TOKENS = 500
SHORT_TOKENS = 8
ALONE = 5
"""Short samples before the group."""
PAUSE_SECONDS = 5.0


def sample_fields(
    server: Server, rng: random.Random, prompt: int, tokens: int, samples: int = 1
) -> dict[str, Any]:
    return {
        "base_model": base_model_name(server),
        "prompt": rng.choices(range(100, 40_000), k=prompt),
        "num_samples": samples,
        "sampling_params": {"max_tokens": tokens, "seed": 1, "stop": []},
    }


def short_seconds(server: Server, rng: random.Random, key: str) -> float:
    """The time of another user's short sample."""
    begin = time.monotonic()
    answer = requests.post(
        f"{server.url}/api/v1/sample",
        json=sample_fields(server, rng, 20, SHORT_TOKENS),
        headers={"X-API-Key": key},
        timeout=600,
    )
    answer.raise_for_status()
    return time.monotonic() - begin


def beside(
    server: Server, group: str, short: Callable[[], float], memory: Memory
) -> tuple[list[float], Any]:
    """Times of short samples until the group is there, and the group's answer."""
    found = []
    while True:
        found.append(short())
        memory.look(server)
        until = time.monotonic() + PAUSE_SECONDS
        while time.monotonic() < until:
            answer = server.post("/retrieve_future", request_id=group, wait=1)
            if answer.status_code != requests.codes.accepted:
                answer.raise_for_status()
                return found, answer.json()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096, help="of each answer")
    parser.add_argument("--folder", type=Path, help="of the default model, if it was made before")
    results_option(parser)
    options = parser.parse_args()
    rng = random.Random(1)  # noqa: S311 - reproducible data
    report = Report(
        benchmark="long_answers",
        settings={"answers": options.samples, "tokens of each": options.tokens},
    )
    with (
        tempfile.TemporaryDirectory(prefix="long-answers-") as folder,
        served("default", Path(folder), options.folder) as (server, _),
    ):
        key = server.manage("createapikey", "berta", "--create-user").stdout.split()[-1]

        def short() -> float:
            return short_seconds(server, rng, key)

        memory = Memory()
        memory.look(server)
        alone = [short() for _ in range(ALONE)]
        begin = time.monotonic()
        fields = sample_fields(server, rng, PROMPT_TOKENS, options.tokens, options.samples)
        group = server.post("/api/v1/asample", **fields)
        group.raise_for_status()
        times, answer = beside(server, group.json()["request_id"], short, memory)
        seconds = time.monotonic() - begin
        lengths = [len(sequence["tokens"]) for sequence in answer["sequences"]]
        assert lengths == [options.tokens] * options.samples
        report.add("short sample alone", alone, unit="s")
        report.add("short sample beside the group", times, unit="s", goal=at_most(1.5))
        report.add("the slowest of them", [max(times)], unit="s", goal=at_most(1.5))
        report.add("the group", [sum(lengths) / seconds], unit="tokens/s")
        report.add("worker memory before", [memory.worker[0] / MEBIBYTE], unit="MiB")
        report.add("worker memory at most", [max(memory.worker) / MEBIBYTE], unit="MiB")
    report.finish(options.results)


if __name__ == "__main__":
    main()
