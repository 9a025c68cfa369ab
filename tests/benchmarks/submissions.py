"""Durable submissions per second: each is committed and flushed before it is answered.

The worker is stopped while submissions are counted, so that it takes no processor time, and
goes on afterwards; then every accepted request must be answered. Clients hold their connection
and are threads of one other process, which shares the machine's cores with web and Postgres.

    python tests/benchmarks/submissions.py
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.report import Report, at_least, results_option
from tests.benchmarks.served_model import served
from tests.server import Server

CONVERSATION = [
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "Four."},
]


@dataclass
class Submitted:
    """The clients' results."""

    request_ids: list[str] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)


def submit(port: int, model_id: str, count: int) -> Submitted:
    """One client: submit ``count`` requests on one connection, one after another."""
    body = json.dumps({"model_id": model_id, "data": [CONVERSATION], "loss_fn": "cross_entropy"})
    seen = Submitted()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for _ in range(count):
        begin = time.perf_counter()
        connection.request(
            "POST",
            "/api/v1/forward_backward_async",
            body,
            {"Content-Type": "application/json"},
        )
        answer = connection.getresponse()
        content = answer.read()
        seen.latencies_ms.append(1000 * (time.perf_counter() - begin))
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {content.decode()}")
        seen.request_ids.append(json.loads(content)["request_id"])
    connection.close()
    return seen


def submit_all(port: int, model_ids: list[str], requests: int) -> tuple[float, Submitted]:
    """One client per model id, all at once; seconds until the last answer."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(len(model_ids)) as pool:
        share = requests // len(model_ids)
        parts = list(pool.map(lambda model_id: submit(port, model_id, share), model_ids))
    seconds = time.perf_counter() - begin
    together = Submitted()
    for part in parts:
        together.request_ids += part.request_ids
        together.latencies_ms += part.latencies_ms
    return seconds, together


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process gets no processor time."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def unanswered(server: Server, request_ids: list[str]) -> int:
    """How many of the accepted requests did not end in a result."""
    return sum(server.retrieve(request_id).status_code != 200 for request_id in request_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description="durable submissions per second")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--requests", type=int, default=400, help="in each repetition")
    parser.add_argument("--web-processes", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    results_option(parser)
    options = parser.parse_args()
    report = Report(
        benchmark="submissions",
        settings={
            "requests": options.requests,
            "repetitions": options.repetitions,
            "web_processes": options.web_processes,
        },
    )
    most = max(options.connections)
    # One user each is the rule; the last row has all of them at one model, whose lane numbers
    # one request at a time.
    cases = [
        (f"{number} connections, a model each", [f"user_{i}" for i in range(number)])
        for number in options.connections
    ] + [(f"{most} connections, one model", ["user_0"] * most)]
    rates: dict[str, list[float]] = {name: [] for name, _ in cases}
    p50: dict[str, list[float]] = {name: [] for name, _ in cases}
    p95: dict[str, list[float]] = {name: [] for name, _ in cases}
    accepted: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="tinkerapi-bench-") as data_dir,
        served("tiny", Path(data_dir), TINKERAPI_WEB_PROCESSES=str(options.web_processes)) as (
            server,
            _,
        ),
    ):
        _, first = submit_all(server.port, [f"user_{i}" for i in range(most)], most)
        assert unanswered(server, first.request_ids) == 0
        worker = server.worker_pid()
        for _ in range(options.repetitions):
            with stopped(worker):
                for name, model_ids in cases:
                    seconds, seen = submit_all(server.port, model_ids, options.requests)
                    rates[name].append(len(seen.request_ids) / seconds)
                    cuts = statistics.quantiles(seen.latencies_ms, n=20)
                    p50[name].append(cuts[9])
                    p95[name].append(cuts[18])
                    accepted += seen.request_ids
            lost = unanswered(server, accepted)
            assert lost == 0, f"{lost} accepted requests have no result"
            accepted.clear()
    for name, _ in cases:
        goal = at_least(500) if name == cases[-2][0] else None
        report.add(f"{name}: submissions", rates[name], unit="1/s", goal=goal)
        report.add(f"{name}: median latency", p50[name], unit="ms")
        report.add(f"{name}: latency, 95 %", p95[name], unit="ms")
    report.finish(options.results)


if __name__ == "__main__":
    main()
