"""The position of a waiting future: what it waits for, how many come before it, about how long.

The figures are estimates for people and for clients that decide whether to continue. Owners take
turns (``futures.claiming``), so of another owner's futures only those count that come before it in
turn: one request behind another owner's thousand has a handful before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from django.utils import timezone

from futures.database import execute
from futures.lane_gaps import gap_ends_at, missing_seq_id
from futures.models import Future
from futures.selectors import PAUSED, QueueState, queue_state
from futures.transitions import State

# The newest thousand before it are read: a future behind so many needs no exact number.
# Running futures come before it in any case; of pending ones, an owner's k-th comes in turn k.
_POSITION = """
WITH before AS (
    SELECT owner_id, state, lane_id, attempts FROM futures_future
    WHERE queue = %(queue)s AND state IN ('pending', 'running') AND created_at < %(created_at)s
    ORDER BY created_at DESC LIMIT 1000
), of_owner AS (
    SELECT owner_id, count(*) FILTER (WHERE state = 'pending') AS pending,
        count(*) FILTER (WHERE state = 'running') AS running
    FROM before GROUP BY owner_id
), own AS (
    SELECT f.state, coalesce(of_owner.pending, 0) AS pending
    FROM futures_future AS f LEFT JOIN of_owner USING (owner_id)
    WHERE f.id = %(id)s
)
SELECT coalesce(sum(of_owner.running + CASE
    WHEN own.state = 'running' THEN 0
    WHEN of_owner.owner_id = %(owner_id)s THEN of_owner.pending
    ELSE least(of_owner.pending, own.pending + 1)
END), 0),
(SELECT count(*) FROM before WHERE lane_id = %(lane_id)s AND state = 'running') + (
    SELECT count(*) FROM (
        SELECT FROM futures_future
        WHERE queue = %(queue)s AND state = 'pending' AND lane_id = %(lane_id)s
            AND seq_id < %(seq_id)s
        LIMIT 1000
    ) AS lower
),
(SELECT coalesce(bool_or(attempts > 0), false) FROM before WHERE state = 'running')
FROM of_owner, own
WHERE own.state IN ('pending', 'running')
"""


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """A waiting future's position, as its owner is told."""

    position: int | None
    """Futures of its queue that come before it; at most 1000. None if unknown."""
    estimated_wait_seconds: float | None
    """Until it is finished; None if unknown."""
    state: str
    """``active``, or ``paused_capacity`` while the queue's worker cannot make it progress;
    the SDK's words."""
    reason: str
    """What it waits for, as a sentence."""


@dataclass(frozen=True, slots=True)
class _Before:
    """The futures before a future, of the newest thousand."""

    position: int
    own_lane: int
    suspect_runs: bool
    """Whether a future is running that may only run alone."""


def queue_position(future: Future) -> int:
    """How many open futures come before it; 0 when it is final. At most 1000."""
    return _before(future).position


def future_position(future: Future, *, gap_seconds: float) -> QueuePosition:
    """The position of a future that is not final.

    The wait covers the futures before it and itself, at the worker's recent rate while
    it had work. It is None while the queue is paused, until the worker has finished a future, and
    while the future's lane waits for a number that has not arrived.

    Args:
        gap_seconds: How long it may wait for such a number (``futures.lane_gaps``).
    """
    queue, before = queue_state(future.queue), _before(future)
    missing = missing_seq_id(future) if future.state == State.PENDING else None
    if missing is not None:
        ends_at = gap_ends_at(future, gap_seconds=gap_seconds, worker_since=queue.started_at)
        return QueuePosition(before.position, None, PAUSED, _gap_reason(missing, ends_at, queue))
    if queue.state == PAUSED:
        return QueuePosition(before.position, None, PAUSED, queue.reason)
    rate = queue.futures_per_second
    wait = round((before.position + 1) / rate, 1) if rate else None
    return QueuePosition(before.position, wait, queue.state, _turn_reason(future, before))


def _before(future: Future) -> _Before:
    found = execute(
        _POSITION,
        {
            "id": future.pk,
            "owner_id": future.owner_id,
            "queue": future.queue,
            "lane_id": future.lane_id,
            "seq_id": future.seq_id,
            "created_at": future.created_at,
        },
    )
    [(position, own_lane, suspect_runs)] = found
    return _Before(int(position), int(own_lane), bool(suspect_runs))


def _gap_reason(missing: int, ends_at: datetime, queue: QueueState) -> str:
    sentence = f"The request with seq_id {missing} has not arrived, and this one must run after it."
    if ends_at <= timezone.now():
        return f"{sentence} It fails soon." if not queue.reason else f"{sentence} {queue.reason}"
    # A worker applies the timeout, so while there is none, this is the earliest possible time.
    verb = "fails not before" if queue.reason else "fails at"
    return f"{sentence} If it does not come, this one {verb} {ends_at:%Y-%m-%d %H:%M:%S} UTC."


def _turn_reason(future: Future, before: _Before) -> str:
    if future.state == State.RUNNING:
        return "It is being computed."
    if before.suspect_runs:
        return "A request that was running when a worker ended runs alone first."
    if before.own_lane:
        return f"It runs after {_requests(before.own_lane, 'earlier')} of the same model."
    if before.position:
        return f"Users take turns: {_requests(before.position, 'other')} before it."
    return "It is next."


def _requests(count: int, which: str) -> str:
    return f"one {which} request" if count == 1 else f"{count} {which} requests"
