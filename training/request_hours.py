"""Requests per hour, without reading a million rows at every look at the dashboard.

Hours that are over are counted once, by a worker, and stored (``CountedHour``). The others are
counted when they are asked for: the present one, and those of which a request is still open. So
the numbers are exact at any time, whether or not a worker has counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta

import orjson
from django.utils import timezone

from futures.database import execute

HOUR = timedelta(hours=1)
SETTLED = timedelta(minutes=10)
"""A request may be committed this long after its time of submission, which its web process sets."""
COUNTED_BACK = 48
"""Hours that a worker looks back to; older ones are not counted any more."""
AT_A_TIME = 2
"""Hours counted in one call, each some hundred milliseconds for 100,000 requests."""

Hourly = dict[tuple[datetime, str], int]
"""Hour and state to number."""

_STORED = """
SELECT hour, CASE WHEN %(owner)s::text IS NULL THEN totals ELSE counts -> %(owner)s END::text
FROM training_countedhour WHERE hour >= %(since)s
"""
_LIVE = """
SELECT h.hour, f.state, f.number
FROM unnest(%(hours)s::timestamptz[]) AS h (hour)
CROSS JOIN LATERAL (
    SELECT state, count(*) AS number FROM futures_future
    WHERE created_at >= h.hour AND created_at < h.hour + interval '1 hour'
        AND (%(owner_id)s::int IS NULL OR owner_id = %(owner_id)s)
    GROUP BY state
) AS f
"""
_TOTAL = """
SELECT of_state.key, sum(of_state.value::bigint)::bigint
FROM training_countedhour AS c, jsonb_each_text(c.totals) AS of_state
GROUP BY of_state.key
"""
_UNCOUNTED = """
SELECT h.hour FROM generate_series(
    coalesce((SELECT min(hour) FROM training_countedhour), %(since)s::timestamptz),
    %(now)s::timestamptz, interval '1 hour'
) AS h (hour)
WHERE NOT EXISTS (SELECT FROM training_countedhour AS c WHERE c.hour = h.hour)
"""
_MISSING = """
SELECT h.hour FROM unnest(%(hours)s::timestamptz[]) AS h (hour)
WHERE NOT EXISTS (SELECT FROM training_countedhour AS c WHERE c.hour = h.hour)
    AND NOT EXISTS (
        SELECT FROM futures_future AS f
        WHERE f.created_at >= h.hour AND f.created_at < h.hour + interval '1 hour'
            AND f.state IN ('pending', 'running')
    )
ORDER BY h.hour DESC LIMIT %(limit)s
"""
_COUNT = """
WITH of_states AS (
    SELECT owner_id, state, count(*) AS number FROM futures_future
    WHERE created_at >= %(hour)s AND created_at < %(hour)s + interval '1 hour'
    GROUP BY owner_id, state
), of_owners AS (
    SELECT owner_id, jsonb_object_agg(state, number) AS states FROM of_states GROUP BY owner_id
), of_all AS (
    SELECT state, sum(number)::bigint AS number FROM of_states GROUP BY state
)
INSERT INTO training_countedhour (hour, counts, totals)
SELECT %(hour)s,
    (SELECT coalesce(jsonb_object_agg(owner_id::text, states), '{}') FROM of_owners),
    (SELECT coalesce(jsonb_object_agg(state, number), '{}') FROM of_all)
ON CONFLICT DO NOTHING
"""


def beginning(moment: datetime) -> datetime:
    """The beginning of a moment's hour."""
    return moment.replace(minute=0, second=0, microsecond=0)


def requests_by_hour(owner_id: int | None, *, since: datetime) -> Hourly:
    """The number of requests submitted in each hour; hours and states without any are left out.

    Args:
        since: The beginning of the first hour.
    """
    owner = None if owner_id is None else str(owner_id)
    stored = execute(_STORED, {"since": since, "owner": owner})
    counted = {hour: orjson.loads(text) if text else {} for hour, text in stored}
    hourly = {(hour, state): n for hour, states in counted.items() for state, n in states.items()}
    live = [hour for hour in _hours(since, timezone.now()) if hour not in counted]
    for hour, state, number in execute(_LIVE, {"hours": live, "owner_id": owner_id}):
        hourly[hour, state] = number
    return hourly


def requests_total() -> dict[str, int]:
    """State to the number of requests that were submitted since the first counted hour, two days
    before the first worker of this version."""
    now = timezone.now()
    totals = defaultdict(int, execute(_TOTAL, {}))
    since = beginning(now) - COUNTED_BACK * HOUR
    live = [hour for (hour,) in execute(_UNCOUNTED, {"since": since, "now": now})]
    for _, state, number in execute(_LIVE, {"hours": live, "owner_id": None}):
        totals[state] += number
    return dict(totals)


def hours_count() -> int:
    """Count some hours that are over and whose requests are all final; return how many."""
    now = timezone.now()
    hours = [
        hour
        for hour in _hours(beginning(now) - COUNTED_BACK * HOUR, now)
        if hour + HOUR + SETTLED <= now
    ]
    missing = execute(_MISSING, {"hours": hours, "limit": AT_A_TIME})
    for (hour,) in missing:
        execute(_COUNT, {"hour": hour})
    return len(missing)


def _hours(since: datetime, now: datetime) -> Iterable[datetime]:
    hour = since
    while hour <= now:
        yield hour
        hour += HOUR
