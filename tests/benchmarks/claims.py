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
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.report import Report, at_least, at_most, results_option

QUEUE = "benchmark-claims"
FUTURES_PER_CLAIM = 8
LOOK_EVERYWHERE = 200
"""Claims between two looks at all lanes."""


def prepare(lanes: int) -> None:
    """The lanes, with a waiting future each."""
    from django.contrib.auth import get_user_model
    from django.db import connection

    from futures.services import future_submit, lane_create

    owner = get_user_model().objects.create_user("benchmark")
    for number in range(lanes):
        lane_id = f"lane {number:05}"
        lane_create(lane_id=lane_id, owner_id=owner.pk, queue=QUEUE)
        future_submit(
            owner_id=owner.pk, queue=QUEUE, kind="wait", payload={"n": 1}, lane_id=lane_id, seq_id=1
        )
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")  # as autovacuum does on a server that has run for a minute


def work(seconds: float, share: int) -> None:
    """One simulated worker, in a process of its own: "go" on its input begins, its output has the
    latencies of its claims.

    Args:
        share: Lanes that its first claim leases.
    """
    from django.db import transaction

    from futures.claiming import future_claim
    from futures.finishing import Outcome, futures_finish, futures_release
    from futures.models import Future
    from futures.payload import encode, encode_payload
    from futures.workers import worker_live, worker_start, worker_stop

    worker = worker_start(queue=QUEUE, figures={})
    worker_live(worker, {})
    print("ready", flush=True)
    sys.stdin.readline()
    result, payload = encode({"loss": 1.0}), encode_payload("wait", {"n": 1})
    latencies: list[float] = []
    taken = 0
    claimed = future_claim(worker=worker, max_futures=share, max_cost=10**9)
    futures_release(worker=worker, request_ids=[future.id for future in claimed])
    print("leased", flush=True)
    sys.stdin.readline()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.monotonic()
        claimed = future_claim(
            worker=worker,
            max_futures=FUTURES_PER_CLAIM,
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
            Future.objects.bulk_create(
                Future(
                    owner_id=future.owner_id,
                    queue=QUEUE,
                    kind="wait",
                    payload=payload.data,
                    payload_digest=payload.digest,
                    lane_id=future.lane_id,
                    seq_id=(future.seq_id or 0) + 1,
                )
                for future in claimed
            )
    print(json.dumps({"latencies": latencies, "taken": taken}), flush=True)
    sys.stdin.readline()
    worker_stop(worker)


def wrong_lanes() -> int:
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
        {"queue": QUEUE},
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


def measure(workers: int, seconds: float, share: int) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--work", str(seconds), "--share", str(share)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(workers)
    ]

    def each_reads() -> list[str]:
        return [process.stdout.readline() for process in processes if process.stdout is not None]

    def tell_each() -> None:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()

    assert each_reads() == ["ready\n"] * workers
    for process in processes:  # one after another, so that each gets its share
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "leased\n"
    tell_each()
    told = [json.loads(line) for line in each_reads()]
    tell_each()
    for process in processes:
        process.communicate()
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=20)
    parser.add_argument("--lanes", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--work", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, default=0, help=argparse.SUPPRESS)
    results_option(parser)
    options = parser.parse_args()
    if options.work is not None:
        import django

        django.setup()
        work(options.work, options.share)
        return
    with tempfile.TemporaryDirectory(prefix="claims-") as folder, postgres(Path(folder)):
        prepare(options.lanes)
        report = Report(
            benchmark="claims",
            settings={
                "workers": options.workers,
                "lanes": options.lanes,
                "seconds": options.seconds,
                "futures in a claim, at most": FUTURES_PER_CLAIM,
            },
        )
        told = measure(options.workers, options.seconds, options.lanes // options.workers)
        latencies = sorted(1000 * latency for each in told for latency in each["latencies"])
        cuts = statistics.quantiles(latencies, n=100)
        claims, taken = len(latencies), sum(each["taken"] for each in told)
        report.add("claims", [claims / options.seconds], unit="1/s", goal=at_least(1000))
        report.add("futures claimed, finished and submitted", [taken / options.seconds], unit="1/s")
        report.add("latency of a claim, median", [cuts[49]], unit="ms")
        report.add("latency of a claim, 99 %", [cuts[98]], unit="ms", goal=at_most(50))
        report.add(
            "lanes out of order, or on two workers", [wrong_lanes()], unit="", goal=at_most(0)
        )
        report.finish(options.results)


if __name__ == "__main__":
    main()
