"""A session's timeline in the trace event format that Perfetto opens.

One row per model and sampling session; one bar per request from when it began to when it was
finished, and how long it had waited before.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from futures.models import Future
from training.listings import Timeline

_FACTS = ("tokens", "loss", "step", "grad_norm", "path")


def trace_of(session_id: str, timeline: Timeline) -> dict[str, Any]:
    """The trace of a session's finished requests."""
    rows = {lane_id: number for number, lane_id in enumerate(timeline.lane_ids, start=1)}
    names = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": lane_id}}
        for lane_id, number in rows.items()
    ]
    events = [_event(future, rows[future.lane_id or ""]) for future in timeline.futures]
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
