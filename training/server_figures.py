"""Figures of the whole server for a monitoring system: a few queries on indexes and small tables.

Everything is read from Postgres, so it does not matter which web process is asked. Nothing is about
one user.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.utils import timezone

from futures.database import execute
from futures.models import Worker
from futures.overview import workers_of
from futures.selectors import HEARTBEAT_TIMEOUT
from training.base_models import base_models
from training.overview import bytes_saved
from training.request_hours import requests_total

RECENT_REQUESTS = 500
"""Newest requests of which the durations are judged."""
RECENT_MINUTES = 10
QUANTILES = (0.5, 0.95)

DEVICE_FIGURES = ("gpu_memory_bytes", "gpu_memory_total_bytes")
"""What a worker on a GPU reports: the taken and all bytes of its memory. A worker of several GPUs
reports that of its first."""

SUMS = (
    "memory_bytes",
    "gpu_memory_bytes",
    "adapter_bytes",
    "resident_adapters",
    "cache_tokens",
    "cache_tokens_held",
    "preemptions",
    "futures_per_second",
)
"""Figures that workers report, added up over the live workers of a base model."""

_OPEN = """
SELECT queue, state, count(*),
    greatest(0, extract(epoch FROM clock_timestamp() - min(created_at)))::float8
FROM futures_future WHERE state IN ('pending', 'running') GROUP BY queue, state
"""
_DURATIONS = """
SELECT percentile_cont(%(quantiles)s::float8[]) WITHIN GROUP (
        ORDER BY extract(epoch FROM started_at - created_at)::float8
    ),
    percentile_cont(%(quantiles)s::float8[]) WITHIN GROUP (
        ORDER BY extract(epoch FROM finished_at - started_at)::float8
    )
FROM (
    SELECT created_at, started_at, finished_at FROM futures_future
    WHERE created_at > now() - %(minutes)s * interval '1 minute'
    ORDER BY created_at DESC LIMIT %(limit)s
) AS recent
"""
_RUNS = """
SELECT base_model, state, count(*), sum(step), sum(tokens) FROM training_run
GROUP BY base_model, state
"""
_LIVES = "SELECT queue, state, count(*) FROM futures_worker GROUP BY queue, state"
_DATABASE = "SELECT pg_database_size(current_database())"


@dataclass(frozen=True, kw_only=True)
class RunTotals:
    """The runs of one base model in one state."""

    base_model: str
    state: str
    runs: int
    steps: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class ServerFigures:
    """The server at one moment. Where a base model is named, an unserved one has its queue's."""

    requests: dict[str, int]
    """State to all requests that were submitted; see ``request_hours.requests_total``."""
    open: list[tuple[str, str, int, float]]
    """Base model, state, number, and the oldest one's age in seconds."""
    wait_seconds: dict[float, float]
    """Quantile to the time before the newest requests began."""
    run_seconds: dict[float, float]
    """Quantile to the time that they took."""
    workers: dict[tuple[str, str], int]
    """Base model and state (``starting``, ``live``, ``silent``) to workers now."""
    worker_sums: dict[str, dict[str, float]]
    """Base model to the sums of ``SUMS``."""
    lives: list[tuple[str, str, int]]
    """Base model, state, workers of all times."""
    runs: list[RunTotals]
    storage: dict[str, int]
    """Kind to bytes: checkpoints, snapshots, database."""

    def sums_of(self, figure: str) -> dict[tuple[str], float]:
        """One of ``SUMS`` by base model."""
        return {(model,): sums[figure] for model, sums in self.worker_sums.items()}


def server_figures() -> ServerFigures:
    """The figures now."""
    names = {model.queue: model.name for model in base_models()}
    waits, runs = execute(
        _DURATIONS,
        {"quantiles": list(QUANTILES), "minutes": RECENT_MINUTES, "limit": RECENT_REQUESTS},
    )[0]
    workers = dict.fromkeys(
        ((name, state) for name in names.values() for state in ("starting", "live", "silent")), 0
    )
    sums: dict[str, dict[str, float]] = {}
    for worker in workers_of(list(names)):
        state = worker_state(worker)
        name = names.get(worker.queue, worker.queue)
        if state in ("starting", "live", "silent"):
            workers[name, state] = workers.get((name, state), 0) + 1
        if state == "live":
            of_model = sums.setdefault(name, {})
            for figure in SUMS:
                of_model[figure] = of_model.get(figure, 0.0) + _number(worker.figures.get(figure))
    [(database_bytes,)] = execute(_DATABASE, {})
    return ServerFigures(
        requests=requests_total(),
        open=[(names.get(queue, queue), *more) for queue, *more in execute(_OPEN, {})],
        wait_seconds=dict(zip(QUANTILES, waits or [], strict=False)),
        run_seconds=dict(zip(QUANTILES, runs or [], strict=False)),
        workers=workers,
        worker_sums=sums,
        lives=[(names.get(queue, queue), *more) for queue, *more in execute(_LIVES, {})],
        runs=[
            RunTotals(
                base_model=base_model,
                state=state,
                runs=number,
                steps=int(steps or 0),
                tokens=int(tokens or 0),
            )
            for base_model, state, number, steps, tokens in execute(_RUNS, {})
        ],
        storage={**bytes_saved(None), "database": database_bytes},
    )


def worker_state(worker: Worker) -> str:
    """The worker's state; ``silent`` if it is marked live, but its heartbeats have stopped."""
    is_living = worker.state in (Worker.WorkerState.STARTING, Worker.WorkerState.LIVE)
    if is_living and timezone.now() - worker.heartbeat_at > HEARTBEAT_TIMEOUT:
        return "silent"
    return str(worker.state)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
