"""Usage by the hour, counted from the futures themselves, so that it is complete.

Tokens are those of finished requests, and those sampled before a cancellation.
Their cost is estimated from worker time, if the operator has set the price of an hour:
the time between one batch and the next is shared among the batch's requests by their estimated
work, so that all busy time is charged and idle time is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, auto

from django.db import connection
from django.db.models import Count, Sum

from training.kinds import Kind
from training.models import Run, SamplingSession
from training.selectors import checkpoints_kept

WINDOW = timedelta(days=14)
"""The longest period of one query."""

LONGEST_WAIT = timedelta(days=2)
"""Requests submitted earlier than this before the window are not counted in it."""

_USAGE = """
WITH finished AS (
    SELECT owner_id, lane_id, kind, state, summary, cost, worker_id, batch, started_at,
           finished_at
    FROM futures_future
    WHERE created_at >= %(earliest)s AND finished_at >= %(begin)s - interval '1 hour'
      AND finished_at < %(end)s AND worker_id IS NOT NULL AND batch IS NOT NULL
), batches AS (
    SELECT worker_id, batch, max(finished_at) AS ended, min(started_at) AS began,
           greatest(sum(cost), 1) AS cost
    FROM finished GROUP BY worker_id, batch
), timed AS (
    SELECT worker_id, batch, cost, extract(epoch FROM ended - greatest(
        began, coalesce(lag(ended) OVER (PARTITION BY worker_id ORDER BY batch), began)
    )) AS seconds
    FROM batches
)
SELECT date_trunc('hour', f.finished_at, 'UTC') AS bucket, f.lane_id, f.kind,
       count(*) FILTER (WHERE f.state = 'ready') AS requests,
       coalesce(sum((f.summary->>'tokens')::bigint)
                FILTER (WHERE f.state <> 'failed'), 0) AS tokens,
       coalesce(sum((f.summary->>'prompt_tokens')::bigint)
                FILTER (WHERE f.state <> 'failed'), 0) AS prompt_tokens,
       coalesce(sum(greatest(t.seconds, 0) * f.cost / t.cost), 0)::float8 AS seconds
FROM finished f JOIN timed t USING (worker_id, batch)
WHERE f.owner_id = %(owner_id)s AND f.finished_at >= %(begin)s
GROUP BY 1, 2, 3 ORDER BY 1, tokens DESC, 2, 3
"""


class Work(Enum):
    """The kind of work that used time and tokens."""

    TRAINING = auto()
    PREFILL = auto()
    """Reading the prompts of samples."""
    SAMPLING = auto()
    CHECKPOINT = auto()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """The usage of one run or sampling session in one hour, for one kind of work."""

    hour: datetime
    """Its beginning, UTC."""
    work: Work
    count: int
    """Tokens; for checkpoints, the number saved."""
    seconds: float
    """Worker time; a sample's time is split between prefill and sampling by their tokens."""
    base_model: str | None
    session_id: str | None
    project_id: str | None


@dataclass(frozen=True, kw_only=True)
class Place:
    """The run or sampling session of a lane."""

    base_model: str | None = None
    session_id: str | None = None
    project_id: str | None = None


_NOWHERE = Place()


def usage_by_hour(*, owner_id: int, begin: datetime, end: datetime) -> list[Usage]:
    """The owner's usage from ``begin`` until before ``end``, whole hours of UTC, in order."""
    with connection.cursor() as cursor:
        cursor.execute(
            _USAGE,
            {
                "owner_id": owner_id,
                "begin": begin,
                "end": end,
                "earliest": begin - LONGEST_WAIT,
            },
        )
        rows = cursor.fetchall()
    places = _places({row[1] for row in rows if row[1]})
    found = []
    for hour, lane_id, kind, requests, tokens, prompt_tokens, seconds in rows:
        place = places.get(lane_id, _NOWHERE)
        for work, count, share in _parts(kind, int(requests), int(tokens), int(prompt_tokens)):
            found.append(
                Usage(
                    hour=hour,
                    work=work,
                    count=count,
                    seconds=seconds * share,
                    base_model=place.base_model,
                    session_id=place.session_id,
                    project_id=place.project_id,
                )
            )
    return sorted(found, key=lambda usage: (usage.hour, -usage.count))


def _parts(
    kind: str, requests: int, tokens: int, prompt_tokens: int
) -> list[tuple[Work, int, float]]:
    """Work, count and share of the time."""
    if kind in (Kind.FORWARD, Kind.FORWARD_BACKWARD):
        return [(Work.TRAINING, tokens, 1.0)] if tokens else []
    if kind == Kind.SAVE_WEIGHTS:
        return [(Work.CHECKPOINT, requests, 1.0)] if requests else []
    if kind == Kind.SAMPLE and prompt_tokens + tokens:
        total = prompt_tokens + tokens
        return [
            (Work.PREFILL, prompt_tokens, prompt_tokens / total),
            (Work.SAMPLING, tokens, tokens / total),
        ]
    return []


def _places(lane_ids: set[str]) -> Mapping[str, Place]:
    places = {
        row[0]: Place(base_model=row[1], session_id=row[2], project_id=row[3])
        for row in Run.objects.filter(id__in=lane_ids).values_list(
            "id", "base_model", "session_id", "session__project_id"
        )
    }
    sampled = SamplingSession.objects.filter(id__in=lane_ids).values_list(
        "id", "base_model", "session_id", "session__project_id"
    )
    return places | {
        row[0]: Place(base_model=row[1], session_id=row[2], project_id=row[3]) for row in sampled
    }


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoints:
    """The current size of a project's checkpoints."""

    project_id: str | None
    count: int
    size_bytes: int


def checkpoints_stored(*, owner_id: int, project_id: str | None = None) -> list[StoredCheckpoints]:
    """The owner's listed checkpoints, by project, the largest first."""
    kept = checkpoints_kept().filter(run__owner_id=owner_id, ephemeral=False)
    if project_id is not None:
        kept = kept.filter(run__session__project_id=project_id)
    rows = kept.order_by().values("run__session__project_id")
    totals = rows.annotate(count=Count("pk"), size=Sum("size_bytes")).order_by("-size")
    return [
        StoredCheckpoints(
            project_id=row["run__session__project_id"] or None,
            count=row["count"],
            size_bytes=row["size"],
        )
        for row in totals
    ]
