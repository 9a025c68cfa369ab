"""A thousand parked waits on one web process: from the commit to the answer.

Clients ask ``/retrieve_future`` with ``wait`` for futures that nothing works on yet. A worker
made by hand, in its own process, then finishes them through the same functions as the real one,
four in a commit, and notes when it began each commit. A latency is the time from there to the
last byte of the answer, so it holds the commit's own flush.

The hand-made worker takes the place of the server's own, since only one may serve a queue, and a
wait on a queue without a base model is answered at once: ``up`` is paused, so that it starts no
other, and its worker is killed.

    python tests/benchmarks/waits.py
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.report import Report, at_most, results_option
from tests.benchmarks.served_model import served, use_database_of
from tests.server import Server, processor_seconds

WAIT_SECONDS = 60
CONNECTING = 32  # clients that connect at one time
FUTURES_PER_COMMIT = 4
MEBIBYTE = 2**20


@dataclass
class Waits:
    """The clients' results of one round."""

    answered_at: dict[str, float]
    """Request id to monotonic seconds."""
    web_bytes_parked: int
    connections_parked: int
    web_cpu_seconds: float = 0.0
    """Processor time of the whole round, from the connections to the last answer."""


@dataclass
class Parked:
    """An open connection on which the answer is still to come."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


async def park(port: int, request_id: str, gate: asyncio.Semaphore) -> Parked:
    """Wait for a future on a separate connection."""
    body = json.dumps({"request_id": request_id, "wait": WAIT_SECONDS}).encode()
    head = (
        f"POST /retrieve_future HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    async with gate:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body)
        await writer.drain()
    return Parked(reader, writer)


async def answered_at(parked: Parked) -> float:
    """When the answer was complete; it must be a result."""
    answer = await parked.reader.read()
    now = time.monotonic()
    parked.writer.close()
    if not answer.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(answer.decode(errors="replace"))
    return now


async def one_round(server: Server, request_ids: list[str], finisher: Finisher) -> Waits:
    """Park a wait for each future, have all of them finished, and see when answers come."""
    gate = asyncio.Semaphore(CONNECTING)
    async with asyncio.timeout(WAIT_SECONDS):
        clients = await asyncio.gather(
            *(park(server.port, request_id, gate) for request_id in request_ids)
        )
        looked = await asyncio.to_thread(look_when_parked, server)
        await asyncio.to_thread(finisher.begin)
        times = await asyncio.gather(*(answered_at(client) for client in clients))
    return Waits(dict(zip(request_ids, times, strict=True)), *looked)


def look_when_parked(server: Server) -> tuple[int, int]:
    """The web's memory and the Postgres connections, once the web has handled all requests that it
    accepted: its processor time stands still."""
    before, still = -1.0, 0
    while still < 3:
        now = web_cpu_seconds(server)
        still = still + 1 if now - before < 0.03 else 0
        before = now
        time.sleep(0.2)
    return web_memory_bytes(server), postgres_connections()


def web_cpu_seconds(server: Server) -> float:
    """Processor time that the web processes have used."""
    return sum(processor_seconds(pid) for pid, _ in web_processes(server))


def web_processes(server: Server) -> list[tuple[int, int]]:
    """Number and resident bytes of the web server's parent and of its one worker."""
    return [
        (process.pid, process.memory_bytes)
        for process in server.processes()
        if process.command.startswith("granian") or "-m granian" in process.command
    ]


def web_memory_bytes(server: Server) -> int:
    return sum(memory for _, memory in web_processes(server))


def postgres_connections() -> int:
    """Open client connections, without this process's own."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        number = int(cursor.fetchone()[0])
    connection.close()  # this thread's own
    return number


def served_queue() -> str:
    """The queue of the server's base model."""
    from training.base_models import base_model_get

    return base_model_get(None).queue


@contextmanager
def paused(server: Server) -> Iterator[None]:
    """The server without a worker: ``up`` is stopped, and the worker that it started is killed."""
    assert server.process is not None
    worker = server.worker_pid()
    server.process.send_signal(signal.SIGSTOP)
    try:
        os.kill(worker, signal.SIGKILL)
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


def submit(count: int) -> list[str]:
    """Futures of the local user on the queue that the hand-made worker serves."""
    from django.contrib.auth import get_user_model

    from futures.services import future_submit
    from tinkerapi.services import LOCAL_USERNAME

    owner = get_user_model().objects.get(username=LOCAL_USERNAME)
    queue = served_queue()
    return [
        future_submit(owner_id=owner.pk, queue=queue, kind="wait", payload={"number": number}).id
        for number in range(count)
    ]


class Finisher:
    """The hand-made worker, in a separate process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def begin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def committed_at(self) -> dict[str, float]:
        """Request id to the monotonic seconds when its commit began."""
        assert self._process.stdout is not None
        times: dict[str, float] = json.loads(self._process.stdout.readline())
        return times


@contextmanager
def finisher_process(server: Server, per_second: float) -> Iterator[Finisher]:
    """Start the hand-made worker; on command it claims everything on its queue."""
    command = [
        *(sys.executable, __file__, "--finish", str(server.data_dir)),
        *("--port", str(server.port), "--per-second", str(per_second)),
        *("--queue", served_queue()),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Finisher(process)
        assert process.stdin is not None
        process.stdin.close()


def finish(queue: str, per_second: float) -> None:
    """The other process: at each line on its input, finish all that waits on the queue.

    Args:
        queue: It waits here for the killed worker's lock to be free.
        per_second: Futures finished in a second; 0 finishes all in one commit.
    """
    from django.db import transaction

    from futures.claiming import future_claim
    from futures.finishing import Outcome, futures_finish
    from futures.payload import encode
    from futures.workers import worker_live, worker_start, worker_stop

    worker = worker_start(queue=queue, figures={})
    worker_live(worker, {})
    result = encode({"loss": 1.0})
    print("ready", flush=True)
    for batch, _ in enumerate(sys.stdin):
        claimed = []
        while more := future_claim(worker=worker, max_futures=1000, max_cost=10**9):
            claimed += more
        size = FUTURES_PER_COMMIT if per_second else len(claimed)
        times: dict[str, float] = {}
        due = time.monotonic()
        for start in range(0, len(claimed), size):
            ids = [future.id for future in claimed[start : start + size]]
            if per_second:
                time.sleep(max(0.0, due - time.monotonic()))
                due += size / per_second
            with transaction.atomic():
                outcomes = [Outcome(request_id=request_id, result=result) for request_id in ids]
                futures_finish(worker=worker, outcomes=outcomes, batch=batch)
                now = time.monotonic()
            times |= dict.fromkeys(ids, now)
        print(json.dumps(times), flush=True)
    worker_stop(worker)


def percentiles(latencies_ms: list[float]) -> tuple[float, float, float]:
    cuts = statistics.quantiles(latencies_ms, n=100)
    return cuts[49], cuts[94], cuts[98]


def measure(
    server: Server, *, waits: int, repetitions: int, per_second: float
) -> tuple[list[tuple[float, float, float]], list[Waits]]:
    """Percentiles of the latency in milliseconds, and the rounds they come from."""
    cuts, rounds = [], []
    with finisher_process(server, per_second) as finisher:
        for _ in range(repetitions):
            request_ids = submit(waits)
            before = web_cpu_seconds(server)
            seen = asyncio.run(one_round(server, request_ids, finisher))
            seen.web_cpu_seconds = web_cpu_seconds(server) - before
            committed = finisher.committed_at()
            cuts.append(
                percentiles([1000 * (seen.answered_at[i] - committed[i]) for i in request_ids])
            )
            rounds.append(seen)
    return cuts, rounds


def main() -> None:
    parser = argparse.ArgumentParser(description="latency and memory of parked waits")
    parser.add_argument("--waits", type=int, default=1000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--per-second", type=float, default=100.0, help="futures finished")
    parser.add_argument("--finish", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--queue", help=argparse.SUPPRESS)
    results_option(parser)
    options = parser.parse_args()
    if options.finish:
        use_database_of(Server(options.finish, options.port))
        finish(options.queue, options.per_second)
        return
    names = ("waits", "repetitions", "per_second")
    report = Report(benchmark="waits", settings={name: getattr(options, name) for name in names})
    with (
        tempfile.TemporaryDirectory(prefix="tinkerapi-bench-") as data_dir,
        served("tiny", Path(data_dir)) as (server, _),
    ):
        use_database_of(server)
        memory_before, connections_before = web_memory_bytes(server), postgres_connections()
        shape = {"waits": options.waits, "repetitions": options.repetitions}
        with paused(server):
            steady, rounds = measure(server, per_second=options.per_second, **shape)
            burst, bursts = measure(server, per_second=0.0, **shape)
            memory_after = web_memory_bytes(server)
    for index, (percentile, goal) in enumerate([("50", None), ("95", None), ("99", at_most(100))]):
        report.add(
            f"commit to answer, {percentile} %", [c[index] for c in steady], unit="ms", goal=goal
        )
    for index, percentile in enumerate(["50", "95", "99"]):
        report.add(
            f"all finished by one commit: commit to answer, {percentile} %",
            [c[index] for c in burst],
            unit="ms",
        )
    for name, done in (("", rounds), ("all finished by one commit: ", bursts)):
        report.add(
            f"{name}web's processor time for a wait",
            [1000 * item.web_cpu_seconds / options.waits for item in done],
            unit="ms",
        )
    report.add("web memory before", [memory_before / MEBIBYTE], unit="MiB")
    report.add(
        "web memory, all parked",
        [item.web_bytes_parked / MEBIBYTE for item in rounds],
        unit="MiB",
        goal=at_most(300),
    )
    report.add("web memory after all rounds", [memory_after / MEBIBYTE], unit="MiB")
    report.add("Postgres connections before", [connections_before], unit="")
    report.add(
        "Postgres connections, all parked", [item.connections_parked for item in rounds], unit=""
    )
    report.finish(options.results)


if __name__ == "__main__":
    main()
