"""A session's requests on a timeline, in the trace event format that Perfetto opens.

One row per model and sampling session; one bar per request from when it began to when it was
finished, and how long it had waited before.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from futures.models import Future
from training.models import Run, SamplingSession

MAX_REQUESTS = 100_000
"""The newest so many are shown."""

_FACTS = ("tokens", "loss", "step", "grad_norm", "path")


def session_trace(session_id: str) -> dict[str, Any]:
    """The trace of a session's finished requests."""
    runs = Run.objects.filter(session_id=session_id).order_by("model_seq_id")
    samplers = SamplingSession.objects.filter(session_id=session_id).order_by("seq_id")
    lanes = [*runs.values_list("id", flat=True), *samplers.values_list("id", flat=True)]
    rows = {lane_id: number for number, lane_id in enumerate(lanes, start=1)}
    futures = Future.objects.without_bodies().filter(
        lane_id__in=lanes, started_at__isnull=False, finished_at__isnull=False
    )
    names = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": lane_id}}
        for lane_id, number in rows.items()
    ]
    newest = futures.order_by("-created_at")[:MAX_REQUESTS]
    events = [_event(future, rows[future.lane_id or ""]) for future in newest.iterator()]
    return {
        "traceEvents": names + events,
        "displayTimeUnit": "ms",
        "otherData": {"session": session_id},
    }


def _event(future: Future, row: int) -> dict[str, Any]:
    began, ended = future.started_at or future.created_at, future.finished_at or future.created_at
    return {
        "ph": "X",
        "name": future.kind,
        "cat": future.state,
        "pid": 1,
        "tid": row,
        "ts": _microseconds(began),
        "dur": max(_microseconds(ended) - _microseconds(began), 0),
        "args": {
            "request_id": future.id,
            "seq_id": future.seq_id,
            "waited_seconds": (began - future.created_at).total_seconds(),
            **{name: future.summary[name] for name in _FACTS if name in future.summary},
            **({"error": future.error} if future.error else {}),
        },
    }


def _microseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000)
