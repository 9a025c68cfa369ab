"""How a worker handles futures that were cancelled while it held them.

The owner's commit cancels the future (``futures.cancelling.future_cancel``), so a worker
may find at any time that a row it holds is final. It learns this from a notification, or when it
finishes or releases the row. It never undoes the cancellation: its own work for the row is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from futures.database import execute
from futures.models import Worker
from futures.plain import to_jsonb

_CANCELLED = """
SELECT id FROM futures_future
WHERE id = ANY (%(ids)s::text[]) AND state = 'cancelled' AND worker_id = %(worker_id)s
"""

# Takes no lock: a takeover locks the worker before its futures, a finish locks in the other order.
_CANCELLED_WHILE_LIVE = f"""
{_CANCELLED} AND EXISTS (
    SELECT FROM futures_worker WHERE id = %(worker_id)s AND state IN ('starting', 'live')
)
"""

_NOTE = """
UPDATE futures_future AS f SET summary = f.summary || o.summary::jsonb, batch = %(batch)s
FROM unnest(%(ids)s::text[], %(summaries)s::text[]) AS o (id, summary)
WHERE f.id = o.id AND f.id = ANY (%(ids)s::text[])
    AND f.state = 'cancelled' AND f.worker_id = %(worker_id)s
"""


def futures_cancelled(
    *, worker: Worker, request_ids: Sequence[str], must_live: bool = False
) -> set[str]:
    """The ids that were cancelled after the worker claimed them.

    One statement, in the caller's transaction if there is one.

    Args:
        must_live: Return no id if the worker was replaced.
    """
    if not request_ids:
        return set()
    statement = _CANCELLED_WHILE_LIVE if must_live else _CANCELLED
    rows = execute(statement, {"ids": list(request_ids), "worker_id": worker.pk})
    return {request_id for (request_id,) in rows}


def futures_note_cancelled(
    *, worker: Worker, summaries: Mapping[str, Mapping[str, Any]], batch: int
) -> None:
    """Record the work done for cancelled futures before the worker dropped them.

    One statement, in the caller's transaction if there is one.

    Args:
        summaries: Request id to the values merged into its summary.
        batch: Number of the engine batch within the worker's life.
    """
    if summaries:
        execute(
            _NOTE,
            {
                "ids": list(summaries),
                "summaries": [to_jsonb(summary) for summary in summaries.values()],
                "batch": batch,
                "worker_id": worker.pk,
            },
        )
