"""Eight runs on one worker and on two, and what the move of a run costs.

Two servers run beside each other on the same machine, one with one worker of its base model and one
with two; every worker has one thread. In turns each gets the same steps of eight runs (a
forward_backward of two conversations and an optim_step) and works them off, while the other is
idle.

The machine's own limit is measured in the same way: plain peft loops with one thread each, two
against one, on as many tokens. They share nothing but the processor and its memory.

The move: on the server with two workers, one is told to stop, which writes its runs' snapshots and
releases them; the other loads them. The figure is the time from a request of such a run to its
answer, less the time of the same request after that.

    python tests/benchmarks/two_workers.py [--model tiny]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.all_cores import RANK, Training, own_script
from tests.benchmarks.report import Report, at_least, at_most, results_option
from tests.benchmarks.served_model import served
from tests.server import Server

RUNS = [f"run-{number}" for number in range(8)]
SENTENCE = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "
CONVERSATIONS = [
    [
        {"role": "user", "content": f"Question {number}: {SENTENCE * 4}"},
        {"role": "assistant", "content": SENTENCE * 4},
    ]
    for number in range(2)
]
STEP_TOKENS = 380
"""Tokens of a run's step in all, as the default model counts them."""


def make_runs(server: Server) -> None:
    for name in RUNS:
        answer = server.post("/api/v1/add_lora", model_id=name, rank=RANK, seed=1)
        assert answer.status_code == 200, answer.text


def submit(server: Server, name: str, steps: int) -> list[str]:
    ids = []
    for _ in range(steps):
        for path, fields in (
            ("forward_backward_async", {"data": CONVERSATIONS}),
            ("optim_step_async", {"adam_params": {"learning_rate": 1e-4}}),
        ):
            answer = server.post(f"/api/v1/{path}", model_id=name, **fields)
            assert answer.status_code == 200, answer.text
            ids.append(answer.json()["request_id"])
    return ids


def steps_per_second(server: Server, steps: int) -> float:
    begin = time.monotonic()
    ids = [request_id for name in RUNS for request_id in submit(server, name, steps)]
    server.results(ids)
    return len(RUNS) * steps / (time.monotonic() - begin)


def machine_limit(folder: Path, dtype: str, turns: int) -> list[float]:
    """How much faster two processes do the same work than one."""
    step = Training("a step", (STEP_TOKENS // 2,) * 2)
    found = []
    with (
        own_script(folder, dtype, num_threads=1) as first,
        own_script(folder, dtype, num_threads=1) as second,
        ThreadPoolExecutor(2) as threads,
    ):

        def seconds(script: Callable[[Training], float]) -> float:
            return sum(script(step) for _ in RUNS)

        seconds(first), seconds(second)
        for _ in range(turns):
            alone = seconds(first)
            found.append(2 * alone / max(threads.map(seconds, (first, second))))
    return found


def wait_for_workers(server: Server, number: int) -> None:
    import requests

    while True:
        answer = requests.get(f"{server.url}/readyz", timeout=60).json()
        if sum(answer["workers"].values()) == number:
            return
        time.sleep(0.1)


def move_seconds(server: Server) -> list[float]:
    """For each run that changes its worker: its first request's time there, less its second's."""
    workers = [item.pid for item in server.processes() if " engineworker" in item.command]
    leaving = min(workers)
    os.kill(leaving, signal.SIGTERM)
    while Path(f"/proc/{leaving}").exists():
        time.sleep(0.02)
    found = []
    for name in RUNS:
        took = []
        for _ in range(2):
            begin = time.monotonic()
            server.results(submit(server, name, 1))
            took.append(time.monotonic() - begin)
        found.append(took[0] - took[1])
    return sorted(found)[len(found) // 2 :]  # the other half has not moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("tiny", "default"), default="default")
    parser.add_argument("--steps", type=int, default=2, help="of each run, in one turn")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", help="that the workers compute in")
    parser.add_argument("--folder", type=Path, help="of the default model, if it was made before")
    results_option(parser)
    options = parser.parse_args()
    settings = {"TINKERAPI_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="workers-") as folder:
        one_dir, two_dir = Path(folder) / "one", Path(folder) / "two"
        one_dir.mkdir()
        two_dir.mkdir()
        with (
            served(options.model, one_dir, options.folder, **settings, TINKERAPI_WORKERS="1") as (
                one,
                model,
            ),
            served(
                options.model,
                two_dir,
                options.folder or (model if options.model == "default" else None),
                **settings,
                TINKERAPI_WORKERS="2",
            ) as (two, _),
        ):
            wait_for_workers(two, 2)
            for server in (one, two):
                make_runs(server)
                steps_per_second(server, 1)
            report = Report(
                benchmark="two_workers",
                settings={
                    "model": options.model,
                    "runs": len(RUNS),
                    "rank": RANK,
                    "steps in a turn": options.steps,
                    "threads of a worker": 1,
                },
            )
            rates: list[tuple[float, float]] = [
                (steps_per_second(one, options.steps), steps_per_second(two, options.steps))
                for _ in range(options.repetitions)
            ]
            report.add("one worker", [before for before, _ in rates], unit="steps/s")
            report.add("two workers", [after for _, after in rates], unit="steps/s")
            ratios = [after / before for before, after in rates]
            report.add("two workers against one", ratios, unit="x", goal=at_least(1.6))
            if options.model == "default":
                limit = machine_limit(options.folder or model, options.dtype, options.repetitions)
                report.add("two peft loops against one", limit, unit="x")
            moves = move_seconds(two)
            report.add(
                "move of a run, load of its snapshot included", moves, unit="s", goal=at_most(2)
            )
            report.finish(options.results)


if __name__ == "__main__":
    main()
