"""Twenty workers claim from two thousand lanes of one queue on one Postgres.

The workers are simulated: each claims a few futures, commits a result for each, and submits the
next future of those lanes, so every lane always has one that waits. All lanes are leased; a worker
looks at its own lanes, as a real one does when it is notified, and now and then at all. A claim's
latency is that of the call. At the end every lane must have run in order, on one worker, each
number once.

    python tests/benchmarks/claims.py
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.report import Report, at_least, at_most, results_option

SIZES = (1, 8)
"""Futures in a claim, at most: one, as when a worker is woken for each, and some."""
LOOK_EVERYWHERE = 200
"""Claims between two looks at all lanes."""

WARM_UP_SECONDS = 3.0
"""Postgres plans a statement anew for its first seven times on a connection."""


def queue_name(size: int) -> str:
    return f"benchmark-claims-of-{size}"


def prepare(lanes: int, queue: str) -> None:
    """The lanes of a queue, with a waiting future each."""
    from django.contrib.auth import get_user_model
    from django.db import connection

    from futures.models import Future, Lane
    from futures.payload import encode_payload

    owner = get_user_model().objects.create_user(queue)
    made = Lane.objects.bulk_create(
        Lane(id=f"{queue} {number:05}", owner=owner, queue=queue) for number in range(lanes)
    )
    payload = encode_payload("wait", {"n": 1})
    Future.objects.bulk_create(
        Future(
            owner=owner,
            queue=queue,
            lane=lane,
            seq_id=1,
            kind="wait",
            payload=payload.data,
            payload_digest=payload.digest,
        )
        for lane in made
    )
    with connection.cursor() as cursor:
        cursor.execute("VACUUM ANALYZE")  # as autovacuum does on a server that has run a minute


def submit_next(request_ids: list[str]) -> None:
    """Submit to the lane of each future its next one, with the same payload.

    Clients do that through web processes, whose costs are not measured here, so it is one
    statement.
    """
    from futures.database import execute
    from futures.models import new_request_id

    execute(
        """
        INSERT INTO futures_future (
            id, owner_id, queue, lane_id, seq_id, kind, state, payload, payload_digest, summary,
            cost, delayable, interruptible, error, category, error_code, attempts, created_at
        )
        SELECT next.id, owner_id, queue, lane_id, seq_id + 1, kind, 'pending', payload,
            payload_digest, '{}', cost, false, false, '', '', '', 0, statement_timestamp()
        FROM unnest(%(ids)s::text[], %(next_ids)s::text[]) AS next (before, id)
        JOIN futures_future AS f ON f.id = next.before AND f.id = ANY (%(ids)s::text[])
        """,
        {"ids": request_ids, "next_ids": [new_request_id() for _ in request_ids]},
    )


@dataclass(frozen=True)
class Told:
    """What a simulated worker has measured."""

    latencies: list[float]
    """Of each claim, in seconds."""
    taken: int
    """Futures that it has claimed, finished and submitted again."""
    postgres_seconds: float
    """CPU time of its connection's process; without Postgres's own processes, which write to the
    disk."""
    worker_seconds: float
    """CPU time of its own process."""


def backend_seconds() -> float:
    """CPU time so far of the Postgres process that serves this thread's connection."""
    from futures.database import psycopg_connection

    pid = psycopg_connection().info.backend_pid
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def work(pipe: Connection, seconds: float, share: int, size: int) -> None:
    """One simulated worker, in a process of its own.

    It leases its share, measures, and stops, each time when it is told to; it answers to the second
    with ``Told``.

    Args:
        share: Lanes that its first claim leases.
        size: Futures in a claim, at most.
    """
    from django.db import transaction

    from futures.claiming import future_claim
    from futures.finishing import Outcome, futures_finish, futures_release
    from futures.payload import encode
    from futures.workers import worker_live, worker_start, worker_stop

    worker = worker_start(queue=queue_name(size), figures={})
    worker_live(worker, {})
    pipe.send("ready")
    pipe.recv()
    result = encode({"loss": 1.0})
    claimed = future_claim(worker=worker, max_futures=share, max_cost=10**9)
    futures_release(worker=worker, request_ids=[future.id for future in claimed])
    pipe.send("leased")
    pipe.recv()

    def cycles(seconds: float) -> tuple[list[float], int]:
        latencies: list[float] = []
        taken = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            begin = time.monotonic()
            claimed = future_claim(
                worker=worker,
                max_futures=size,
                max_cost=10**9,
                only_leased=len(latencies) % LOOK_EVERYWHERE != LOOK_EVERYWHERE - 1,
            )
            latencies.append(time.monotonic() - begin)
            taken += len(claimed)
            with transaction.atomic():
                futures_finish(
                    worker=worker,
                    outcomes=[Outcome(request_id=future.id, result=result) for future in claimed],
                    batch=len(latencies),
                )
                submit_next([future.id for future in claimed])
        return latencies, taken

    cycles(WARM_UP_SECONDS)
    begun_postgres, begun_worker = backend_seconds(), time.process_time()
    latencies, taken = cycles(seconds)
    pipe.send(
        Told(
            latencies,
            taken,
            postgres_seconds=backend_seconds() - begun_postgres,
            worker_seconds=time.process_time() - begun_worker,
        )
    )
    pipe.recv()
    worker_stop(worker)


def wrong_lanes(queue: str) -> int:
    """Lanes in which a number is missing, or that ran on more than one worker."""
    from futures.database import execute

    [(wrong,)] = execute(
        """
        SELECT count(*) FROM (
            SELECT lane_id FROM futures_future WHERE queue = %(queue)s AND state = 'ready'
            GROUP BY lane_id
            HAVING count(*) <> max(seq_id) OR count(DISTINCT worker_id) > 1
        ) AS wrong
        """,
        {"queue": queue},
    )
    return int(wrong)


@contextmanager
def postgres(data_dir: Path) -> Iterator[None]:
    """An embedded Postgres with our tables; it flushes each commit as a real one does."""
    os.environ |= {"TINKERAPI_DATA_DIR": str(data_dir), "DATABASE_URL": ""}
    os.environ["DJANGO_SETTINGS_MODULE"] = "tinkerapi.settings"
    import django

    django.setup()
    from django.core.management import call_command
    from django.db import connection

    from tinkerapi.server.postgres import EmbeddedPostgres

    with EmbeddedPostgres(data_dir):
        call_command("migrate", verbosity=0)
        yield
        connection.close()


def measure(workers: int, seconds: float, share: int, size: int) -> list[Told]:
    from django.db import connections

    connections.close_all()
    # Forked, so that twenty do not import the same first.
    forked = multiprocessing.get_context("fork")
    pipes = [forked.Pipe() for _ in range(workers)]
    processes = [
        forked.Process(target=work, args=(theirs, seconds, share, size)) for _, theirs in pipes
    ]
    for process in processes:
        process.start()
    ours = [pipe for pipe, _ in pipes]
    for pipe in ours:
        assert pipe.recv() == "ready"
    for pipe in ours:  # one after another, so that each gets its share
        pipe.send("lease")
        assert pipe.recv() == "leased"
    for pipe in ours:
        pipe.send("measure")
    told = [pipe.recv() for pipe in ours]
    for pipe in ours:
        pipe.send("stop")
    for process in processes:
        process.join()
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=20)
    parser.add_argument("--lanes", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=20.0)
    results_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="claims-") as folder, postgres(Path(folder)):
        report = Report(
            benchmark="claims",
            settings={
                "workers": options.workers,
                "lanes": options.lanes,
                "seconds": options.seconds,
            },
        )
        for size in SIZES:
            add_figures(report, size, options)
        report.finish(options.results)


def add_figures(report: Report, size: int, options: argparse.Namespace) -> None:
    """Measure claims of at most so many futures, on a queue of their own."""
    queue = queue_name(size)
    prepare(options.lanes, queue)
    told = measure(options.workers, options.seconds, options.lanes // options.workers, size)
    latencies = sorted(1000 * latency for each in told for latency in each.latencies)
    cuts = statistics.quantiles(latencies, n=100)
    claims, taken = len(latencies), sum(each.taken for each in told)
    kind = "one future" if size == 1 else f"{size} futures"
    report.add(f"claims of {kind}", [claims / options.seconds], unit="1/s", goal=at_least(1000))
    report.add("futures claimed, finished and submitted", [taken / options.seconds], unit="1/s")
    for where, spent in (
        ("Postgres", sum(each.postgres_seconds for each in told)),
        ("the worker", sum(each.worker_seconds for each in told)),
    ):
        report.add(
            f"CPU time of a claim, its commit and its submissions: {where}",
            [1000 * spent / claims],
            unit="ms",
        )
    report.add("latency of a claim, median", [cuts[49]], unit="ms")
    report.add("latency of a claim, 99 %", [cuts[98]], unit="ms", goal=at_most(50))
    report.add(
        "lanes out of order, or on two workers", [wrong_lanes(queue)], unit="", goal=at_most(0)
    )


if __name__ == "__main__":
    main()
