"""The server's figures in Prometheus' text format; ``docs/monitoring.md`` lists all of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from django.conf import settings
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tinkerapi.server.last_backup import last_backup_at
from training.server_figures import ServerFigures, server_figures

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Values = Mapping[Any, float]
"""Tuple of label values to number."""

FINAL = ("ready", "failed", "cancelled")


def exposition() -> bytes:
    """All metrics as they are now."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(server_figures()))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, figures: ServerFigures) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        figures = self._figures
        yield _counter(
            "requests",
            "Finished requests, by the state in which they ended.",
            ["state"],
            {(state,): figures.requests.get(state, 0) for state in FINAL},
        )
        yield _gauge(
            "requests_open",
            "Requests that wait or run now.",
            ["base_model", "state"],
            {(name, state): number for name, state, number, _ in figures.open},
        )
        yield _gauge(
            "oldest_pending_seconds",
            "Age of the oldest request that waits.",
            ["base_model"],
            {(name,): age for name, state, _, age in figures.open if state == "pending"},
        )
        for name, what, quantiles in (
            ("wait_seconds", "Time before the newest requests began.", figures.wait_seconds),
            ("run_seconds", "Time that the newest requests took.", figures.run_seconds),
        ):
            by_quantile = {(f"{quantile:g}",): took for quantile, took in quantiles.items()}
            yield _gauge(name, what, ["quantile"], by_quantile)
        yield _gauge("workers", "Workers now.", ["base_model", "state"], figures.workers)
        yield _counter(
            "worker_ends",
            "Workers that were stopped or lost.",
            ["base_model", "state"],
            {
                (name, state): number
                for name, state, number in figures.lives
                if state in ("stopped", "lost")
            },
        )
        for name, figure, what in (
            ("worker_memory_bytes", "memory_bytes", "Memory of the live workers."),
            ("worker_gpu_memory_bytes", "gpu_memory_bytes", "Taken memory of their GPUs."),
            ("adapter_bytes", "adapter_bytes", "Memory of the adapters in them."),
            ("resident_adapters", "resident_adapters", "Adapters in their memory."),
            ("cache_tokens", "cache_tokens", "Tokens for which their key-value caches have room."),
            ("cache_tokens_held", "cache_tokens_held", "Those that running samples take of it."),
            ("requests_per_second", "futures_per_second", "The workers' own estimate."),
        ):
            yield _gauge(name, what, ["base_model"], figures.sums_of(figure))
        yield _counter(
            "preemptions",
            "Sequences that were interrupted because a cache was full, by the live workers.",
            ["base_model"],
            figures.sums_of("preemptions"),
        )
        runs = {(of.base_model, of.state): of for of in figures.runs}
        labels = ["base_model", "state"]
        yield _gauge("runs", "Runs.", labels, {key: of.runs for key, of in runs.items()})
        steps, tokens = dict[tuple[str, ...], float](), dict[tuple[str, ...], float]()
        for of in figures.runs:
            key = (of.base_model,)
            steps[key] = steps.get(key, 0) + of.steps
            tokens[key] = tokens.get(key, 0) + of.tokens
        yield _counter("optimizer_steps", "Optimizer steps.", ["base_model"], steps)
        yield _counter("trained_tokens", "Tokens trained on.", ["base_model"], tokens)
        yield _gauge(
            "storage_bytes",
            "Bytes by kind.",
            ["kind"],
            {(kind,): size for kind, size in figures.storage.items()},
        )
        yield from _machine()


def _machine() -> Iterable[Metric]:
    try:
        disk = shutil.disk_usage(settings.DATA_DIR)
    except OSError:
        pass  # the other figures are still right
    else:
        yield _gauge(
            "disk_free_bytes", "Free bytes on the data folder's disk.", [], {(): disk.free}
        )
        yield _gauge("disk_bytes", "Size of that disk.", [], {(): disk.total})
    backup_at = last_backup_at()
    if backup_at is not None:
        seconds = backup_at.timestamp()
        what = "When the last backup was complete, in seconds since 1970."
        yield _gauge("last_backup_timestamp_seconds", what, [], {(): seconds})


def _gauge(name: str, what: str, labels: Sequence[str], values: Values) -> Metric:
    return _filled(GaugeMetricFamily(f"tinkerapi_{name}", what, labels=labels), values)


def _counter(name: str, what: str, labels: Sequence[str], values: Values) -> Metric:
    """Prometheus' library adds ``_total`` to the name."""
    return _filled(CounterMetricFamily(f"tinkerapi_{name}", what, labels=labels), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Values) -> Metric:
    for labels, value in values.items():
        family.add_metric(list(labels), value)
    return family
