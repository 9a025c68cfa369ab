"""Lanes that wait for a number that never arrives.

Requests may arrive out of order, so a missing seq id is normal for a moment and an early
request is never refused. But a client may have died between two of its requests. Requests that
wait behind the gap then fail with a reason, instead of waiting forever.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from django.db import transaction

from futures.database import alias, execute
from futures.models import Future
from futures.notify import notify_finished_after_commit

SETTLE_SECONDS = 600.0
"""How long clocks must have been steady before a worker applies timeouts. A client's
heartbeats come every ten seconds, and it tries to deliver for five minutes."""

# The rows from the lane's next seq id on are numbered; the first whose seq id exceeds its number
# is behind a gap. A future behind a thousand others need not know.
_MISSING = """
WITH lane AS (
    SELECT next_seq_id FROM futures_lane WHERE id = %(lane_id)s AND ordered
), numbered AS (
    SELECT f.seq_id, lane.next_seq_id - 1 + row_number() OVER (ORDER BY f.seq_id) AS expected
    FROM lane CROSS JOIN LATERAL (
        SELECT seq_id FROM futures_future
        WHERE lane_id = %(lane_id)s AND seq_id BETWEEN lane.next_seq_id AND %(seq_id)s
        ORDER BY seq_id LIMIT 1000
    ) AS f
)
SELECT min(expected) FROM numbered WHERE seq_id > expected
"""

# A claim leaves next_seq_id at the first number that has no row.
_REFUSE = """
UPDATE futures_future AS f
SET state = 'failed', category = 'user', error_code = 'SeqIdMissing',
    error = format('This request waited for seq_id %%s, which never arrived.', l.next_seq_id),
    finished_at = statement_timestamp()
FROM futures_lane AS l
WHERE f.queue = %(queue)s AND f.state = 'pending' AND l.id = f.lane_id AND l.ordered
    AND f.seq_id > l.next_seq_id
    AND f.created_at < statement_timestamp() - make_interval(secs => %(patience_seconds)s)
    AND NOT EXISTS (
        SELECT FROM futures_future AS missing
        WHERE missing.lane_id = l.id AND missing.seq_id = l.next_seq_id
    )
RETURNING f.id
"""


def missing_seq_id(future: Future) -> int | None:
    """The lowest number before a waiting future's that has not arrived in its lane; None if the
    future waits for no such number."""
    if future.lane_id is None or future.seq_id is None:
        return None
    [(missing,)] = execute(_MISSING, {"lane_id": future.lane_id, "seq_id": future.seq_id})
    return missing if missing is None else int(missing)


def gap_ends_at(future: Future, *, gap_seconds: float, worker_since: datetime | None) -> datetime:
    """When a future that waits behind a gap fails; later if clocks jump or no worker runs.

    Args:
        gap_seconds: How long it may wait.
        worker_since: When the queue's worker started: it applies no timeout until it has seen
            steady
            clocks for long enough.
    """
    ends_at = future.created_at + timedelta(seconds=gap_seconds)
    if worker_since is None:
        return ends_at
    return max(ends_at, worker_since + timedelta(seconds=max(SETTLE_SECONDS, gap_seconds)))


def gaps_refuse(*, queue: str, patience_seconds: float) -> int:
    """Fail futures that waited behind a gap in their lane for longer than ``patience_seconds``.

    Returns how many. The missing request may still arrive and will run; the failed ones are
    skipped. The queue's worker calls this regularly. Own transaction.
    """
    with transaction.atomic(using=alias()):
        rows = execute(_REFUSE, {"queue": queue, "patience_seconds": patience_seconds})
        notify_finished_after_commit([request_id for (request_id,) in rows])
    return len(rows)
