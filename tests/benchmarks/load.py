"""More clients at once than the server was made for: nothing fails, is lost or is done twice.

Four parts, one after another, on one whole server with the tiny model and one web process:

- sampling: 512 clients wait for a sample each, again and again;
- bodies: 64 clients send 5 MB each at the same time;
- queue: 10,000 requests of many models wait, and are then worked off;
- polls: 500 clients poll as the SDK does, past the end of a poll, on futures that nobody works on
  until all are parked.

Each counts answers that were no result, and compares the database with what clients were told:
every accepted request ran exactly once, in its model's order. Memory is what ``ps`` says, looked
at twice a second.

    python tests/benchmarks/load.py
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.crowd import (
    CONNECTING,
    MEBIBYTE,
    TIMEOUT_SECONDS,
    Answer,
    Crowd,
    Ledger,
    run,
    stopped,
    watched,
)
from tests.benchmarks.report import Report, at_most, results_option
from tests.benchmarks.served_model import base_model_name, served
from tests.server import Server

SDK = {"X-Stainless-Package-Version": "0.38.0"}
POLL_SECONDS = 25  # after which the server answers 408


def failures(report: Report, part: str, statuses: Counter[int], *expected: int) -> None:
    """Report how many answers were none of these statuses; print the statuses."""
    print(f"{part}: answers by status: {dict(sorted(statuses.items()))}", flush=True)
    bad = sum(count for status, count in statuses.items() if status not in expected)
    report.add(f"{part}: answers other than a result", [bad], unit="", goal=at_most(0))


def add_latencies(report: Report, part: str, seconds: Sequence[float]) -> None:
    cuts = statistics.quantiles(seconds, n=20)
    report.add(f"{part}: median latency", [cuts[9]], unit="s")
    report.add(f"{part}: latency, 95 %", [cuts[18]], unit="s")


def sampling(server: Server, report: Report, *, clients: int, rounds: int) -> None:
    """All clients wait for a sample; a sample's text depends on its seed only."""
    fields = {
        "base_model": base_model_name(server),
        "prompt": "once upon a time",
        "sampling_params": {"max_tokens": 16},
    }

    def sample(seed: int) -> dict[str, Any]:
        return {**fields, "sampling_params": {"max_tokens": 16, "seed": seed}}

    seeds = list(range(16))
    alone = [server.post("/api/v1/sample", **sample(seed)).json()["sequences"] for seed in seeds]
    crowd, answers = Crowd(server.port), list[tuple[int, Answer]]()

    async def client(number: int) -> None:
        for turn in range(rounds):
            seed = seeds[(number + turn) % len(seeds)]
            answers.append((seed, await crowd.post("/api/v1/sample", sample(seed))))

    async def everybody() -> None:
        crowd.gate = asyncio.Semaphore(CONNECTING)
        await asyncio.gather(*(client(number) for number in range(clients)))

    ledger = Ledger(server)
    begin = time.monotonic()
    run(everybody())
    seconds = time.monotonic() - begin
    failures(report, "sampling", crowd.statuses, 200)
    good = [(seed, answer) for seed, answer in answers if answer.status == 200]
    mixed_up = sum(answer.json()["sequences"] != alone[seed] for seed, answer in good)
    report.add("sampling: texts of another's seed", [mixed_up], unit="", goal=at_most(0))
    lost = ledger.wrong_number(clients * rounds)
    report.add("sampling: futures lost or doubled", [lost], unit="", goal=at_most(0))
    report.add("sampling: samples per second", [len(good) / seconds], unit="1/s")
    add_latencies(report, "sampling", [answer.seconds for _, answer in answers])


def large_body(number: int, size_bytes: int) -> bytes:
    """A forward_backward of few tokens with many targets each, as distillation sends them."""
    rng = random.Random(number)  # noqa: S311 - reproducible data
    tokens, targets = 50, 64

    def datum() -> dict[str, Any]:
        wide = range(targets)
        return {
            "model_input": [rng.randrange(3, 250) for _ in range(tokens)],
            "loss_fn_inputs": {
                "target_tokens": [[rng.randrange(3, 250) for _ in wide] for _ in range(tokens)],
                "weights": [[rng.random() / targets for _ in wide] for _ in range(tokens)],
            },
        }

    one = len(json.dumps(datum()))
    data = [datum() for _ in range(max(1, size_bytes // one))]
    fields = {"model_id": f"large-{number % 8}", "data": data, "wait": 0}
    body = json.dumps(fields).encode()
    return body + b" " * (size_bytes - len(body))


def bodies(server: Server, report: Report, *, clients: int, size_bytes: int) -> None:
    """All clients send a large body at once; the worker then computes all of them."""
    prepared = [large_body(number, size_bytes) for number in range(clients)]
    crowd, answers = Crowd(server.port), list[Answer]()

    async def client(body: bytes) -> None:
        answers.append(await crowd.ask("/api/v1/forward_backward", body))

    async def everybody() -> None:
        crowd.gate = asyncio.Semaphore(clients)
        await asyncio.gather(*(client(body) for body in prepared))

    ledger = Ledger(server)
    begin = time.monotonic()
    run(everybody())
    seconds = time.monotonic() - begin
    failures(report, "bodies", crowd.statuses, 200, 202)
    ids = [answer.json()["request_id"] for answer in answers if answer.status == 202]
    wait_until_ready(server, ids)
    wrong = ledger.wrong(ids, answered=crowd.statuses[200])
    report.add("bodies: futures lost or doubled", [wrong], unit="", goal=at_most(0))
    sent = sum(map(len, prepared)) / MEBIBYTE
    report.add("bodies: accepted and durable", [sent / seconds], unit="MiB/s")
    add_latencies(report, "bodies", [answer.seconds for answer in answers])


def queue(server: Server, report: Report, *, requests: int, models: int) -> None:
    """A long queue: passes and steps of many models, in turns, submitted by as many clients."""
    turn = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "two"}]
    each = requests // models
    crowd, ids = Crowd(server.port), list[str]()

    async def client(number: int) -> None:
        model = {"model_id": f"queued-{number}"}
        for index in range(each):
            if index % 2 == 0:
                answer = await crowd.post("/fwdbwd", {**model, "data": [turn]})
            else:
                answer = await crowd.post("/optim_step", model)
            if answer.status == 200:
                ids.append(answer.json()["request_id"])

    async def everybody() -> None:
        crowd.gate = asyncio.Semaphore(CONNECTING)
        await asyncio.gather(*(client(number) for number in range(models)))

    ledger = Ledger(server)
    with stopped(server.worker_pid()):
        begin = time.monotonic()
        run(everybody())
        report.add(
            "queue: submissions per second", [len(ids) / (time.monotonic() - begin)], unit="1/s"
        )
        failures(report, "queue", crowd.statuses, 200)
        looks = []
        for request_id in ids[:: max(1, len(ids) // 50)]:
            begin = time.monotonic()
            assert server.post("/retrieve_future", request_id=request_id).status_code == 202
            looks.append(time.monotonic() - begin)
        add_latencies(report, "queue: asked while all wait", looks)
    begin = time.monotonic()
    wait_until_ready(server, ids)
    report.add("queue: finished per second", [len(ids) / (time.monotonic() - begin)], unit="1/s")
    wrong = ledger.wrong(ids) + ledger.wrong_steps("queued-", models, each // 2)
    report.add("queue: futures lost or doubled", [wrong], unit="", goal=at_most(0))


def polls(server: Server, report: Report, *, clients: int, parked_seconds: float) -> None:
    """All clients poll as the SDK does: held, answered 408, polling again at once, until the
    result.

    Args:
        parked_seconds: How long nobody works; more than ``POLL_SECONDS`` for a 408.
    """
    crowd, results, looks = Crowd(server.port), list[Answer](), list[float]()

    async def submitted() -> list[str]:
        crowd.gate = asyncio.Semaphore(CONNECTING)
        answers = await asyncio.gather(
            *(crowd.post("/optim_step", {"model_id": f"polled-{i % 10}"}) for i in range(clients))
        )
        return [answer.json()["request_id"] for answer in answers]

    async def client(request_id: str) -> None:
        while True:
            answer = await crowd.post("/api/v1/retrieve_future", {"request_id": request_id}, **SDK)
            if answer.status != 408:
                results.append(answer)
                return

    async def everybody(ids: list[str], resume: Callable[[], None]) -> None:
        crowd.gate = asyncio.Semaphore(CONNECTING)
        polling = asyncio.gather(*(client(request_id) for request_id in ids))
        until = time.monotonic() + parked_seconds
        while time.monotonic() < until:  # parked, and once around
            begin = time.monotonic()
            await Crowd(server.port).post("/get_info", {"model_id": "polled-0"})
            looks.append(time.monotonic() - begin)
            await asyncio.sleep(0.5)
        resume()
        await polling

    for index in range(10):
        assert server.post("/add_lora", model_id=f"polled-{index}").status_code == 200
    ledger = Ledger(server)
    with stopped(server.worker_pid()) as resume:
        ids = run(submitted())
        resumed_at = 0.0

        def go_on() -> None:
            nonlocal resumed_at
            resumed_at = time.monotonic()
            resume()

        run(everybody(ids, go_on))
    told = time.monotonic() - resumed_at
    failures(report, "polls", crowd.statuses, 200, 408)
    report.add("polls: told to ask again", [crowd.statuses[408]], unit="")
    report.add("polls: from work to the last answer", [told], unit="s")
    wrong = ledger.wrong(ids) + abs(len(results) - clients)
    report.add("polls: futures lost or doubled", [wrong], unit="", goal=at_most(0))
    add_latencies(report, "polls: another request meanwhile", looks)


def wait_until_ready(server: Server, request_ids: Sequence[str]) -> None:
    """The last of each model is not the last of all, so ask for the newest few, then count."""
    for request_id in request_ids[-100:]:
        server.retrieve(request_id, seconds=TIMEOUT_SECONDS)
    for request_id in request_ids[::50]:
        server.retrieve(request_id, seconds=TIMEOUT_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description="more clients at once than is comfortable")
    parser.add_argument("--sampling", type=int, default=512, help="sampling clients; 0: none")
    parser.add_argument("--rounds", type=int, default=4, help="samples of each")
    parser.add_argument("--bodies", type=int, default=64, help="large bodies; 0: none")
    parser.add_argument("--body-bytes", type=int, default=5_000_000)
    parser.add_argument("--queue", type=int, default=10_000, help="queued futures; 0: none")
    parser.add_argument("--models", type=int, default=20, help="that the queue is of")
    parser.add_argument("--polls", type=int, default=500, help="parked polls; 0: none")
    results_option(parser)
    options = parser.parse_args()
    settings = {name: value for name, value in vars(options).items() if name != "results"}
    report = Report(benchmark="load", settings=settings)
    with (
        tempfile.TemporaryDirectory(prefix="tinkerapi-bench-") as data_dir,
        served(
            "tiny", Path(data_dir), TINKERAPI_NUM_THREADS="1", TINKERAPI_HANG_SECONDS="3600"
        ) as (server, _),
    ):
        parts: list[tuple[str, int, Callable[[], None]]] = [
            (
                "sampling",
                options.sampling,
                lambda: sampling(server, report, clients=options.sampling, rounds=options.rounds),
            ),
            (
                "bodies",
                options.bodies,
                lambda: bodies(
                    server, report, clients=options.bodies, size_bytes=options.body_bytes
                ),
            ),
            (
                "queue",
                options.queue,
                lambda: queue(server, report, requests=options.queue, models=options.models),
            ),
            (
                "polls",
                options.polls,
                lambda: polls(
                    server, report, clients=options.polls, parked_seconds=POLL_SECONDS + 10
                ),
            ),
        ]
        for part, size, play in parts:
            if size:
                with watched(server, report, part):
                    play()
        report.add("worker lives", [Ledger(server).worker_lives()], unit="", goal=at_most(1))
    report.finish(options.results)


if __name__ == "__main__":
    main()
