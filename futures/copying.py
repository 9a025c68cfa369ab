"""Submits the requests of one lane again in another, without reading them into this process."""

from __future__ import annotations

from collections.abc import Sequence

from futures.database import execute

_COPY = """
WITH copied AS (
    INSERT INTO futures_future (
        id, owner_id, queue, lane_id, seq_id, kind, state, payload, payload_digest, summary, cost,
        delayable, interruptible, error, category, error_code, attempts, replay_of_id, created_at
    )
    SELECT
        'future_' || replace(gen_random_uuid()::text, '-', ''), lane.owner_id, lane.queue, lane.id,
        lane.last_seq_id + row_number() OVER (ORDER BY first.seq_id),
        first.kind, 'pending', first.payload, first.payload_digest,
        (
            SELECT coalesce(jsonb_object_agg(key, value), '{}') FROM jsonb_each(first.summary)
            WHERE key = ANY(%(facts)s::text[])
        ),
        first.cost,
        false, first.interruptible, '', '', '', 0, first.id, statement_timestamp()
    FROM futures_future AS first CROSS JOIN futures_lane AS lane
    WHERE first.id = ANY(%(request_ids)s::text[]) AND first.payload IS NOT NULL
        AND lane.id = %(lane_id)s
    RETURNING id
)
UPDATE futures_lane SET last_seq_id = last_seq_id + (SELECT count(*) FROM copied)
WHERE id = %(lane_id)s RETURNING (SELECT count(*) FROM copied)
"""


def futures_copy(*, request_ids: Sequence[str], lane_id: str, facts: Sequence[str]) -> int:
    """Submit requests again at the end of another lane, in the order of their seq ids.

    Each refers to the first one in ``replay_of``. It wakes no worker: submit another request to
    the lane in the same transaction. The lane must be one whose requests the server numbers.

    Args:
        facts: Names in a summary that are known when a request is submitted, and are copied.

    Returns:
        How many were copied; those without a payload are not.
    """
    [(number,)] = execute(
        _COPY, {"request_ids": list(request_ids), "lane_id": lane_id, "facts": list(facts)}
    )
    return int(number)
