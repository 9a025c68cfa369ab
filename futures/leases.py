"""Leases: which worker may run the futures of an ordered lane.

::

               claim                     release
     free ───────────────> leased ────────────────────> free
                             │  the worker has ended     ^
                             └───────────────────────────┘

A lane is leased to an epoch. A claim takes futures of lanes that are leased to its worker and of
free ones, which it leases in the same statement (``futures.claiming``). From then on only that
worker runs the lane, and it may keep in memory what the lane's futures have built. It releases
the lane when it has dropped that; a worker that stops releases all its lanes. The lanes of a
worker that has ended are freed together with its futures (``futures.lost_workers``).

Only the holder of a lane's lease commits for it. A lease is taken away only by ending its epoch,
and then its futures wait again, so a commit of the former holder finds none of them running.

Lanes without order and futures without a lane are not leased: any worker may run them.
"""

from __future__ import annotations

from collections.abc import Collection

from django.db import transaction

from futures.database import alias, execute
from futures.models import Worker
from futures.notify import notify_bell

_RELEASE = """
WITH released AS (
    UPDATE futures_lane AS l SET worker_id = NULL
    WHERE l.id = ANY (%(lanes)s::text[]) AND l.worker_id = %(worker_id)s AND NOT EXISTS (
        SELECT FROM futures_future
        WHERE worker_id = %(worker_id)s AND state = 'running' AND lane_id = l.id
    )
    RETURNING l.id
)
SELECT id FROM released
"""

_HAS_WORK = """
SELECT EXISTS (
    SELECT FROM unnest(%(lanes)s::text[]) AS released (id)
    JOIN futures_future AS f
        ON f.queue = %(queue)s AND f.state = 'pending' AND f.lane_id = released.id
)
"""

# A worker that may have ended would get lanes in vain.
_UNEVEN = """
SELECT coalesce(
    max(leases) FILTER (WHERE id = %(worker_id)s) - min(leases) FILTER (WHERE id <> %(worker_id)s)
    >= 2, false)
FROM (
    SELECT id, (SELECT count(*) FROM futures_lane WHERE worker_id = w.id) AS leases
    FROM futures_worker AS w
    WHERE queue = %(queue)s AND state = 'live'
        AND heartbeat_at > statement_timestamp() - make_interval(secs => %(fresh_seconds)s)
) AS crew
"""

FRESH_SECONDS = 20.0
"""A worker whose last heartbeat is older gets no lanes of others."""

_HELD = """
SELECT id FROM futures_lane
WHERE id = %(lane_id)s AND worker_id = %(worker_id)s AND EXISTS (
    SELECT FROM futures_worker WHERE id = %(worker_id)s AND state IN ('starting', 'live')
)
FOR SHARE OF futures_lane
"""


def lanes_release(*, worker: Worker, lane_ids: Collection[str]) -> None:
    """Let any worker run these lanes, as far as this one runs none of their futures.

    Others are woken if a future waits in one of them. Own transaction.
    """
    if not lane_ids:
        return
    with transaction.atomic(using=alias()):
        rows = execute(_RELEASE, {"worker_id": worker.pk, "lanes": list(lane_ids)})
        released = [lane_id for (lane_id,) in rows]
        # A separate statement: a future that was submitted during the first one rings for the
        # lease that it saw, so this one must see it.
        [(has_work,)] = execute(_HAS_WORK, {"queue": worker.queue, "lanes": released})
        if has_work:
            notify_bell(worker.queue)
    worker.leases.difference_update(released)


def leases_are_uneven(worker: Worker) -> bool:
    """Whether this worker should give a lane to another one, which has at least two fewer."""
    parameters = {
        "worker_id": worker.pk,
        "queue": worker.queue,
        "fresh_seconds": FRESH_SECONDS,
    }
    return bool(execute(_UNEVEN, parameters)[0][0])


def lease_is_held(*, worker: Worker, lane_id: str) -> bool:
    """Whether the lane is leased to this worker; it stays so to the end of the transaction."""
    return bool(execute(_HELD, {"worker_id": worker.pk, "lane_id": lane_id}))
