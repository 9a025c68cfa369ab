"""The console's pages over a large database: server time of each page.

A million requests, 2,000 runs, and one run of 20,000 optimizer steps with as many client metrics
and kept rollouts are written by SQL. Then each page is asked for through Django's test client, as a
superuser; the first answer, which compiles templates, does not count. The goal is for the CPU time
of this process and of Postgres together, the mean of some answers: on a free machine it is the
server's time, and the wall time beside it is also that of the machine's other work.

    python tests/benchmarks/console_pages.py [--futures N]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.report import Report, at_most, results_option
from tests.benchmarks.served_model import served, use_database_of
from tests.server import Server, processor_seconds

RUNS = 2_000
STEPS = 20_000
ROLLOUTS = 20_000
LONG = "long-run"
GOAL_MS = 200.0
REPEATS = 9

_RUNS = """
INSERT INTO training_run (id, owner_id, name, base_model, rank, alpha, seed, train_mlp, train_attn,
    train_unembed, state, error, step, applied_seq_id, tokens, user_metadata, created_at,
    last_request_at)
SELECT CASE WHEN n = 1 THEN %(long)s ELSE 'run-' || n END, %(owner)s,
    CASE WHEN n = 1 THEN %(long)s ELSE 'run-' || n END, 'base', 32, 32, 0, true, true, true,
    'ready', '', CASE WHEN n = 1 THEN %(steps)s ELSE %(each)s / 2 END,
    CASE WHEN n = 1 THEN 2 * %(steps)s ELSE %(each)s END, 1000, '{}',
    now() - n * interval '1 minute', now()
FROM generate_series(1, %(runs)s) AS n
"""
_LANES = """
INSERT INTO futures_lane (id, owner_id, queue, ordered, last_seq_id, next_seq_id)
SELECT id, owner_id, 'engine', true, applied_seq_id, applied_seq_id + 1 FROM training_run
"""
_FUTURES = """
INSERT INTO futures_future (id, owner_id, queue, lane_id, seq_id, kind, state, payload_digest,
    result, summary, cost, delayable, interruptible, error, category, error_code, attempts,
    created_at, started_at, finished_at)
SELECT 'future_' || md5(r.id || ':' || s), r.owner_id, 'engine', r.id, s,
    CASE WHEN s %% 2 = 1 THEN 'forward_backward' ELSE 'optim_step' END,
    CASE WHEN s %% 997 = 0 THEN 'failed' ELSE 'ready' END, ''::bytea,
    CASE WHEN s %% 997 = 0 THEN NULL ELSE '\\x00'::bytea END,
    CASE WHEN s %% 2 = 1 THEN jsonb_build_object('datums', 64, 'loss_fn', 'ppo', 'loss',
            1 / (1 + s::float8), 'tokens', 4096, 'trained_tokens', 2048, 'advantage_mean', 0.01,
            'advantage_std', 0.9, 'advantage_zero_share', 0.25, 'ratio_mean', 1.01, 'kl_k1', 0.01,
            'kl_k3', 0.01, 'entropy', 1.5, 'sampled_length', 32, 'clip_share', 0.02,
            'sampled_tokens', 2048, 'sequences', 64)
        ELSE jsonb_build_object('learning_rate', 1e-4, 'step', s / 2, 'grad_norm', 1.5,
            'run_tokens', 2048 * s) END,
    4096, false, false, CASE WHEN s %% 997 = 0 THEN 'no' ELSE '' END,
    CASE WHEN s %% 997 = 0 THEN 'user' ELSE '' END, '', 0,
    r.created_at + s * interval '1 second', r.created_at + s * interval '1 second',
    r.created_at + s * interval '1 second'
FROM training_run AS r CROSS JOIN LATERAL generate_series(1, r.applied_seq_id) AS s
"""
_METRICS = """
INSERT INTO training_clientmetrics (run_id, step, metrics, created_at)
SELECT %(long)s, n, jsonb_build_object('reward', n::float8 / %(steps)s, 'correct', 0.5), now()
FROM generate_series(1, %(steps)s) AS n
"""
_SAMPLED = """
INSERT INTO training_sampledstep (run_id, step, sequences, tokens, stopped_by_length, logprob_sum)
SELECT %(long)s, n, 64, 2048, 3, -1000 FROM generate_series(1, %(steps)s) AS n
"""
_ROLLOUTS = """
INSERT INTO training_rollout (run_id, step, request_id, number, prompt_digest, sequence_digest,
    prompt, completion, prompt_tokens, tokens, stop_reason, logprob_mean, advantage, trained_by,
    created_at)
SELECT %(long)s, n / 64, 'future_' || md5((n / 8)::text), n %% 8, decode(md5((n / 8)::text), 'hex'),
    decode(md5(n::text), 'hex'), repeat('What is the sum of these numbers? ', 20),
    repeat('The answer is ' || n || '. ', 30), 200, 200, 'stop', -0.5, 0.5, '', now()
FROM generate_series(1, %(rollouts)s) AS n
"""
_USAGE = """
INSERT INTO training_dailyusage (day, owner_id, run_id, work, requests, tokens, seconds)
SELECT (now() AT TIME ZONE 'UTC')::date - (hashtext(r.id) %% 26 + 26) %% 26 - d, r.owner_id, r.id,
    work, 100, 100000, 60
FROM training_run AS r, generate_series(0, 4) AS d,
    unnest(ARRAY['training', 'prefill', 'sampling', 'other']) AS work
"""
_CHECKPOINTS = """
INSERT INTO training_checkpoint (run_id, owner_id, path_run, kind, ephemeral, name, seq_id, step,
    directory, size_bytes, public, user_metadata, created_at)
SELECT r.id, r.owner_id, r.id, 'training', false, 'step-' || n, n, n, 'checkpoints/' || n,
    100000000, false, '{}', now()
FROM training_run AS r, generate_series(1, 10) AS n
"""
_FILL = (_RUNS, _LANES, _METRICS, _SAMPLED, _ROLLOUTS, _FUTURES, _USAGE, _CHECKPOINTS)


def fill(owner_id: int, num_futures: int) -> None:
    """Write the rows; the constraints and indexes are those of a real server."""
    from django.db import connection

    each = 2 * ((num_futures - 2 * STEPS) // (RUNS - 1) // 2)
    values = {"owner": owner_id, "long": LONG, "runs": RUNS, "steps": STEPS, "each": each}
    with connection.cursor() as cursor:
        for sql in _FILL:
            cursor.execute(sql, {**values, "rollouts": ROLLOUTS})
        cursor.execute("VACUUM ANALYZE")


def pages() -> dict[str, str]:
    """What is measured, in words, to its address."""
    run = "/admin/training/run/long-run"
    digest = "cfcd208495d565ef66e7dff9f98764da"  # md5 of 0
    since = f"after={2 * STEPS - 8}&metrics={STEPS}&sampled={STEPS}"
    others = "".join(f"&run=run-{n}" for n in range(2, 11))
    return {
        "dashboard": "/admin/",
        "list of runs": "/admin/training/run/",
        "runs found by a word": "/admin/training/run/?q=run-17",
        "list of requests": "/admin/futures/future/",
        "failed requests": "/admin/futures/future/?state__exact=failed",
        "run: overview": f"{run}/change/",
        "run: all curves": f"{run}/curves/",
        "run: what came since": f"{run}/curves/?{since}",
        "run: a zoomed part": f"{run}/curves/?after=10000&until=15000",
        "run: rollouts": f"{run}/change/?tab=rollouts",
        "run: rollouts found by words": f"{run}/change/?tab=rollouts&q=answer+19999",
        "run: a group": f"{run}/change/?tab=rollouts&group={digest}&step=0",
        "run: requests": f"{run}/change/?tab=requests",
        "run: checkpoints": f"{run}/change/?tab=checkpoints",
        "run: lineage": f"{run}/change/?tab=lineage",
        "usage": "/admin/training/dailyusage/",
        "usage of 90 days": "/admin/training/dailyusage/?days=90",
        "storage": "/admin/training/checkpoint/storage/",
        "ten runs compared": f"/admin/training/run/compare/?run={LONG}{others}",
    }


def milliseconds(ask: Callable[[], Any]) -> float:
    """Wall time of an answer."""
    begin = time.perf_counter()
    answer = ask()
    took = 1000 * (time.perf_counter() - begin)
    if answer.status_code != 200:
        raise SystemExit(f"{answer.request['PATH_INFO']}: {answer.status_code}")
    return took


def used_seconds(server: Server) -> float:
    """CPU time of this process and of Postgres with the processes that it has ended."""
    postgres = [item.pid for item in server.processes() if "postgres" in item.command]
    used = [processor_seconds(pid, with_ended_children=True) for pid in postgres]
    return time.process_time() + sum(used)


def measure(report: Report, server: Server) -> None:
    from django.contrib.auth import get_user_model
    from django.test import Client

    from training.request_hours import hours_count

    user = get_user_model().objects.create_superuser("bench", password=None)
    fill(user.pk, report.settings["futures"])
    begin = time.perf_counter()
    while hours_count():  # as a worker does, some at a time
        pass
    took = 1000 * (time.perf_counter() - begin)
    report.add("counting the hours of two days, once", [took], unit="ms")
    client = Client(headers={"host": "localhost"})
    client.force_login(user)
    for name, address in pages().items():
        ask = lambda address=address: client.get(address)  # noqa: E731
        milliseconds(ask)
        begin = used_seconds(server)
        took = [milliseconds(ask) for _ in range(REPEATS)]
        used = 1000 * (used_seconds(server) - begin) / REPEATS
        report.add(name, took, unit="ms")
        report.add(f"{name}, CPU", [used], unit="ms", goal=at_most(GOAL_MS))
        print(f"{name}: {used:.0f} ms CPU, {[round(wall) for wall in took]} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--futures", type=int, default=1_000_000)
    results_option(parser)
    options = parser.parse_args()
    settings = {"futures": options.futures, "runs": RUNS, "steps": STEPS, "rollouts": ROLLOUTS}
    report = Report(benchmark="console_pages", settings=settings)
    with tempfile.TemporaryDirectory() as folder, served("tiny", Path(folder)) as (server, _):
        use_database_of(server)
        measure(report, server)
    report.finish(options.results)


if __name__ == "__main__":
    main()
