"""How a worker finishes futures or releases them.

Both are fenced: they change only futures that run under the worker's own epoch, and raise if any
other was given. A future that its owner has cancelled meanwhile stays cancelled
(``futures.cancelled``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from django.db import transaction

from futures.cancelled import futures_cancelled
from futures.database import alias, execute
from futures.errors import Fenced
from futures.models import Worker
from futures.notify import TELL_FINISHED
from futures.plain import plain_text, to_jsonb

# One statement, because each round trip costs more than a row.
_FINISH = f"""
WITH finished AS (
    UPDATE futures_future AS f
    SET state = CASE WHEN o.error = '' THEN 'ready' ELSE 'failed' END,
        result = o.result, summary = f.summary || o.summary::jsonb, error = o.error,
        category = o.category, error_code = o.error_code, batch = %(batch)s,
        finished_at = statement_timestamp()
    FROM unnest(
        %(ids)s::text[], %(results)b::bytea[], %(summaries)s::text[], %(errors)s::text[],
        %(categories)s::text[], %(error_codes)s::text[]
    ) AS o (id, result, summary, error, category, error_code)
    WHERE f.id = o.id AND f.id = ANY (%(ids)s::text[])
        AND f.state = 'running' AND f.worker_id = %(worker_id)s
    RETURNING f.id, f.lane_id
) {TELL_FINISHED}
"""  # noqa: S608

_RELEASE = """
WITH released AS (
    UPDATE futures_future
    SET state = 'pending', worker_id = NULL, started_at = NULL
    WHERE id = ANY (%(ids)s::text[]) AND state = 'running' AND worker_id = %(worker_id)s
    RETURNING id, lane_id, seq_id
), moved AS (
    UPDATE futures_lane AS l SET next_seq_id = least(l.next_seq_id, first.seq_id)
    FROM (SELECT lane_id, min(seq_id) AS seq_id FROM released GROUP BY lane_id) AS first
    WHERE l.id = first.lane_id AND l.ordered
)
SELECT id FROM released
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of one future: a result, or an error with its category."""

    request_id: str
    result: bytes | None = None
    """From ``futures.payload.encode``."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """Merged into the future's summary; an equal name replaces the old value."""
    error: str = ""
    category: str = ""
    error_code: str = ""
    """Class name of the domain error."""

    def __post_init__(self) -> None:
        if (self.result is None) != bool(self.error) or bool(self.error) != bool(self.category):
            raise ValueError(f"{self.request_id}: a result, or an error with its category")


def futures_finish(*, worker: Worker, outcomes: Sequence[Outcome], batch: int) -> None:
    """Write outcomes in the caller's transaction; its commit makes them visible.

    The same commit notifies waiters. The outcome of a cancelled future is dropped.

    Args:
        worker: The epoch that claimed them.
        outcomes: At most one for each future.
        batch: Number of the engine batch within the worker's life.

    Raises:
        Fenced: A future is neither running nor cancelled under this epoch. The caller's
            transaction must be rolled back and the worker must end.
    """
    if not transaction.get_connection(alias()).in_atomic_block:
        raise transaction.TransactionManagementError("futures_finish needs a transaction")
    if not outcomes:
        return
    rows = execute(
        _FINISH,
        {
            "worker_id": worker.pk,
            "batch": batch,
            "ids": [outcome.request_id for outcome in outcomes],
            "results": [outcome.result for outcome in outcomes],
            "summaries": [to_jsonb(outcome.summary) for outcome in outcomes],
            "errors": [plain_text(outcome.error) for outcome in outcomes],
            "categories": [str(outcome.category) for outcome in outcomes],
            "error_codes": [outcome.error_code for outcome in outcomes],
        },
    )
    finished = {request_id for request_id, _ in rows}
    late = [o.request_id for o in outcomes if o.request_id not in finished]
    dropped = futures_cancelled(worker=worker, request_ids=late, must_live=True)
    if len(finished) + len(dropped) != len(outcomes):
        raise Fenced


def futures_release(*, worker: Worker, request_ids: Sequence[str]) -> None:
    """Make claimed futures pending again, without counting an attempt. Own transaction.

    Of a lane, release the first future that was not begun and all after it: the next claim begins
    at the first of them. A cancelled future stays cancelled. Notifies nobody.

    Raises:
        Fenced: A future is neither running nor cancelled under this epoch; none was released.
    """
    with transaction.atomic(using=alias()):
        rows = execute(_RELEASE, {"worker_id": worker.pk, "ids": list(request_ids)})
        kept = list(set(request_ids) - {request_id for (request_id,) in rows})
        # A separate statement, because it must see the changes that the first one waited for.
        if len(futures_cancelled(worker=worker, request_ids=kept)) != len(kept):
            raise Fenced
