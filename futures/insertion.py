"""The one statement of a submission.

It numbers the request in its lane, and inserts the future and the django-q task that wakes the
worker. The task carries no data.
"""

from __future__ import annotations

from enum import Enum, auto

from django.db import transaction

from futures.broker import doorbell
from futures.database import alias, execute
from futures.models import Future
from futures.notify import notify_bell
from futures.plain import to_jsonb

# One statement, because each round trip costs more than the row. It inserts nothing if the
# request was submitted before, if an ordered lane is already past its number, or if too many of
# the owner's futures wait. The doorbell is inserted if and only if the future is.
_SUBMIT = """
WITH waiting AS MATERIALIZED (
    SELECT %(max_pending)s::bigint IS NULL OR (
        SELECT count(*) FROM (
            SELECT FROM futures_future WHERE owner_id = %(owner_id)s AND state = 'pending'
            LIMIT %(max_pending)s::bigint
        ) AS pending
    ) < %(max_pending)s::bigint AS has_room
), numbered AS (
    UPDATE futures_lane SET last_seq_id = last_seq_id + 1
    WHERE id = %(lane_id)s AND %(seq_id)s::bigint IS NULL AND (SELECT has_room FROM waiting)
    RETURNING last_seq_id
), inserted AS (
    INSERT INTO futures_future (
        id, owner_id, queue, lane_id, seq_id, idempotency_key, kind, state, payload, result,
        payload_digest, summary, cost, delayable, interruptible, error, category, error_code,
        attempts, replay_of_id, created_at, finished_at
    )
    SELECT
        %(id)s, %(owner_id)s, %(queue)s, %(lane_id)s,
        coalesce(%(seq_id)s::bigint, (SELECT last_seq_id FROM numbered)),
        %(idempotency_key)s, %(kind)s, %(state)s, %(payload)b, %(result)b, %(payload_digest)b,
        %(summary)s::jsonb, %(cost)s, %(delayable)s, %(interruptible)s, %(error)s, %(category)s,
        %(error_code)s, 0, %(replay_of_id)s, %(created_at)s, %(finished_at)s
    WHERE (SELECT has_room FROM waiting) AND NOT EXISTS (
        SELECT FROM futures_lane
        WHERE id = %(lane_id)s AND ordered AND next_seq_id > %(seq_id)s::bigint
    )
    ON CONFLICT DO NOTHING
    RETURNING seq_id
), doorbell AS (
    INSERT INTO django_q_ormq (key, payload, lock)
    SELECT %(queue)s, %(doorbell)s, statement_timestamp() FROM inserted
)
SELECT has_room, (SELECT count(*) FROM inserted), (SELECT seq_id FROM inserted),
    (SELECT worker_id FROM futures_lane WHERE id = %(lane_id)s)
FROM waiting
"""


class Inserted(Enum):
    YES = auto()
    NO = auto()
    """The request exists already (a unique constraint), or its lane is past its number."""
    FULL = auto()


def insert(future: Future, max_pending: int | None) -> Inserted:
    """Insert the future and its doorbell, or neither."""
    if future.lane_id is None or future.seq_id is not None or future.idempotency_key is None:
        return _insert_once(future, max_pending)
    # Only here can a repeat use one of the lane's numbers, which must then be given back.
    with transaction.atomic(using=alias()):
        inserted = _insert_once(future, max_pending)
        if inserted != Inserted.YES:
            transaction.set_rollback(True, using=alias())
    return inserted


def _insert_once(future: Future, max_pending: int | None) -> Inserted:
    [(has_room, count, seq_id, epoch)] = execute(
        _SUBMIT,
        {
            "id": future.id,
            "owner_id": future.owner_id,
            "queue": future.queue,
            "lane_id": future.lane_id,
            "seq_id": future.seq_id,
            "idempotency_key": future.idempotency_key,
            "kind": future.kind,
            "state": str(future.state),
            "payload": future.payload,
            "result": future.result,
            "payload_digest": future.payload_digest,
            "summary": to_jsonb(future.summary),
            "cost": future.cost,
            "delayable": future.delayable,
            "interruptible": future.interruptible,
            "error": future.error,
            "category": str(future.category),
            "error_code": future.error_code,
            "replay_of_id": future.replay_of_id,
            "created_at": future.created_at,
            "finished_at": future.finished_at,
            "doorbell": doorbell(future.queue),
            "max_pending": max_pending,
        },
    )
    if not count:
        return Inserted.NO if has_room else Inserted.FULL
    future.seq_id = seq_id
    future._state.adding = False
    future._state.db = alias()
    notify_bell(future.queue, delayable=future.delayable, epoch=epoch)
    return Inserted.YES
