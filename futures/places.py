"""Where a waiting future stands: how many come before it, and about how long they take.

Both are estimates for people and for clients that decide whether to go on. Owners take turns
(``futures.claiming``), so what another owner has waiting counts only as far as it comes before:
one request behind somebody's thousand has a handful before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from futures.database import execute
from futures.models import Future
from futures.selectors import QueueState, queue_state

# The newest thousand before it are looked at: nobody behind so many needs to know exactly.
# What runs comes before it whatever its turn; of what waits, an owner's k-th comes in turn k.
_POSITION = """
WITH before AS (
    SELECT owner_id, state FROM futures_future
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
END), 0)
FROM of_owner, own
WHERE own.state IN ('pending', 'running')
"""


@dataclass(frozen=True, slots=True)
class Place:
    """What the owner of a waiting future is told."""

    position: int | None
    """Futures of its queue that come before it; at most 1000. None where nobody knows."""
    estimated_wait_seconds: float | None
    """Until it is finished; None where nobody knows."""
    queue: QueueState


def queue_position(future: Future) -> int:
    """How many open futures come before it; 0 when it is final. At most 1000."""
    [(position,)] = execute(
        _POSITION,
        {
            "id": future.pk,
            "owner_id": future.owner_id,
            "queue": future.queue,
            "created_at": future.created_at,
        },
    )
    return int(position)


def future_place(future: Future) -> Place:
    """Where a future that is not final stands.

    The wait is what comes before it, and itself, at the pace the queue's worker had lately while
    it had work. None while the queue is paused, and until the worker has finished something.
    """
    queue, position = queue_state(future.queue), queue_position(future)
    pace = queue.futures_per_second
    wait = round((position + 1) / pace, 1) if pace and queue.state == "active" else None
    return Place(position, wait, queue)
