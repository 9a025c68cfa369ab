"""What to do when a lane waits for a number that never comes.

Requests may arrive out of order, so a missing seq id is normal for a moment and an early
request is never refused. But a client may have died between two of its requests; those who
wait behind the gap are then told so, instead of waiting for ever.
"""

from __future__ import annotations

from django.db import transaction

from futures.database import alias, execute
from futures.notify import notify_finished_after_commit

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


def gaps_refuse(*, queue: str, patience_seconds: float) -> int:
    """Fail what has waited behind a gap in its lane for longer than ``patience_seconds``.

    Returns how many. The missing request may still come and will run; what was failed is
    passed over. To be called every now and then by the queue's worker. Own transaction.
    """
    with transaction.atomic(using=alias()):
        rows = execute(_REFUSE, {"queue": queue, "patience_seconds": patience_seconds})
        notify_finished_after_commit([request_id for (request_id,) in rows])
    return len(rows)
