"""What owners of futures may do: make lanes, submit, cancel, submit again.

A submission is one statement and one commit: it numbers the request in its lane, inserts the
future and the django-q task that rings for it. The task carries no work. What workers do to
futures is in ``futures.claiming``, ``futures.finishing`` and ``futures.workers``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import F, Max
from django.db.models.functions import Coalesce, Greatest, Now
from django.utils import timezone
from django.utils.module_loading import import_string

from futures.broker import doorbell
from futures.database import alias, execute
from futures.errors import (
    FutureNotCancellable,
    FutureNotFound,
    FuturePayloadPruned,
    IdempotencyKeyReused,
    LaneNumberedByClient,
    QueueFull,
    QueueNotServed,
    SeqIdReused,
)
from futures.models import Future, Lane
from futures.notify import (
    notify_bell,
    notify_cancelled_after_commit,
    notify_finished_after_commit,
)
from futures.payload import EncodedPayload, encode, encode_payload
from futures.plain import plain_text, to_jsonb
from futures.transitions import Category, State

# One statement, for each round trip costs more than the row. It inserts nothing when the
# request was submitted before, where an ordered lane has already passed, and when too many of
# the owner's futures wait. The doorbell stands or falls with the future.
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
SELECT has_room, (SELECT count(*) FROM inserted), (SELECT seq_id FROM inserted) FROM waiting
"""


_NOT_TORN_APART = "It runs already, and what it changes is not torn apart: it goes on to its end."


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request will never run."""

    error: str
    category: Category = Category.USER
    error_code: str = ""
    """Class name of the domain error."""


class _Inserted(Enum):
    YES = auto()
    NO = auto()
    """A unique constraint holds this request already, or its lane is past it."""
    FULL = auto()


def lane_create(
    *, lane_id: str, owner_id: int, queue: str, ordered: bool = True, first_seq_id: int = 1
) -> Lane:
    """Make a lane that begins at ``first_seq_id``. Raises IntegrityError when the id is taken."""
    return Lane.objects.create(
        id=lane_id, owner_id=owner_id, queue=queue, ordered=ordered, next_seq_id=first_seq_id
    )


def future_submit(
    *,
    owner_id: int,
    queue: str,
    kind: str,
    payload: Any,
    lane_id: str | None = None,
    seq_id: int | None = None,
    idempotency_key: str | None = None,
    cost: int = 1,
    delayable: bool = False,
    interruptible: bool = False,
    summary: dict[str, Any] | None = None,
    replay_of: Future | None = None,
    max_pending: int | None = None,
    refusal: Refusal | None = None,
    result: Any = None,
) -> Future:
    """Record a request and return its future; asking twice returns the same one.

    (lane, seq_id) names one logical request, and so does (owner, idempotency_key): a client
    that lost our answer may send it again, whatever became of the first. Opens its own
    transaction; the worker is woken when the outermost one commits, never before.

    Args:
        owner_id: Whom it belongs to.
        queue: The engine queue whose worker runs it.
        kind: What is asked for; a word to this app.
        payload: A value that ``futures.payload.encode`` takes, or an EncodedPayload.
        lane_id: An existing lane, or None for a request that may run at any time.
        seq_id: The client's number; None lets the server give the lane's next one.
        idempotency_key: The client's name for this request.
        cost: Estimated tokens of work.
        delayable: A worker may wait a moment for others to run beside it.
        interruptible: It changes nothing but its own result, so it may be cancelled while it runs.
        summary: Small facts for lists and charts.
        replay_of: The future whose request this is.
        max_pending: How many futures of the owner may wait. Submitters that race may pass
            it by as many as they are.
        refusal: The request is invalid but has consumed its seq id: its future is failed
            from the start, and the lane goes on past it.
        result: The request is done by writing it down: its future is ready from the start.

    Raises:
        SeqIdReused: The pair exists with another kind or payload, or the lane is past it. (409)
        IdempotencyKeyReused: The key exists with another lane, kind or payload. (409)
        QueueFull: The owner has ``max_pending`` pending futures. (429)
    """
    encoded = payload if isinstance(payload, EncodedPayload) else encode_payload(kind, payload)
    now = timezone.now()
    future = Future(
        owner_id=owner_id,
        queue=queue,
        kind=kind,
        payload=encoded.data,
        payload_digest=encoded.digest,
        lane_id=lane_id,
        seq_id=seq_id,
        idempotency_key=idempotency_key,
        cost=cost,
        delayable=delayable,
        interruptible=interruptible,
        summary=summary or {},
        replay_of=replay_of,
        created_at=now,
    )
    if refusal is not None:
        future.state = State.FAILED
        future.error = plain_text(refusal.error)
        future.category = refusal.category
        future.error_code = refusal.error_code
        future.finished_at = now
    elif result is not None:
        future.state, future.result, future.finished_at = State.READY, encode(result), now
    while True:
        inserted = _insert(future, max_pending)
        if inserted == _Inserted.YES:
            return future
        first = _first(future)
        if first is not None:
            return first
        if inserted == _Inserted.FULL:
            raise QueueFull
        # The first one was undone, or the server's number met a client's in this lane.
        _renumber(future)


def future_repeated(
    *,
    payload: EncodedPayload,
    owner_id: int,
    lane_id: str | None,
    seq_id: int | None,
    idempotency_key: str | None,
) -> Future | None:
    """The future of this request if it was submitted before; for what cannot be submitted now.

    Raises:
        SeqIdReused, IdempotencyKeyReused: As ``future_submit``.
    """
    return _first(
        Future(
            owner_id=owner_id,
            payload_digest=payload.digest,
            lane_id=lane_id,
            seq_id=seq_id,
            idempotency_key=idempotency_key,
        )
    )


def future_record(
    *,
    owner_id: int,
    queue: str,
    kind: str,
    payload: Any,
    result: Any,
    idempotency_key: str,
    summary: dict[str, Any] | None = None,
) -> Future:
    """A future of no lane that is ready from the start; asking twice returns the same one.

    For requests that are done by writing them down, by clients that expect a future. Runs in
    the caller's transaction.

    Raises:
        IdempotencyKeyReused: The key exists with another lane, kind or payload.
    """
    encoded = encode_payload(kind, payload)
    now = timezone.now()
    future = Future(
        owner_id=owner_id,
        queue=queue,
        kind=kind,
        state=State.READY,
        payload=encoded.data,
        payload_digest=encoded.digest,
        result=encode(result),
        idempotency_key=idempotency_key,
        summary=summary or {},
        created_at=now,
        finished_at=now,
    )
    first = _first(future)
    if first is not None:
        return first
    future.save(force_insert=True)
    return future


def lane_refuse(*, lane_id: str, refusal: Refusal, but: str) -> int:
    """Fail all that waits or runs in a lane that no worker will come back to, except one kind;
    say how many.

    A worker that runs some of it all the same finds that its epoch holds it no more and commits
    nothing. Runs in the caller's transaction, or opens its own.
    """
    with transaction.atomic(using=alias()):
        open_futures = Future.objects.filter(lane_id=lane_id).open().select_for_update(no_key=True)
        refused = open_futures.exclude(kind=but).order_by("seq_id")
        ids = list(refused.values_list("id", flat=True))
        Future.objects.filter(id__in=ids).update(
            state=State.FAILED,
            error=refusal.error,
            category=refusal.category,
            error_code=refusal.error_code,
            finished_at=Now(),
        )
        notify_finished_after_commit(ids)
    return len(ids)


def _insert(future: Future, max_pending: int | None) -> _Inserted:
    """Insert the future and its doorbell, or neither."""
    if future.lane_id is None or future.seq_id is not None or future.idempotency_key is None:
        return _insert_once(future, max_pending)
    # Only here can a repeat use up one of the lane's numbers, which must then be given back.
    with transaction.atomic(using=alias()):
        inserted = _insert_once(future, max_pending)
        if inserted != _Inserted.YES:
            transaction.set_rollback(True, using=alias())
    return inserted


def _insert_once(future: Future, max_pending: int | None) -> _Inserted:
    [(has_room, count, seq_id)] = execute(
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
        return _Inserted.NO if has_room else _Inserted.FULL
    future.seq_id = seq_id
    future._state.adding = False
    future._state.db = alias()
    notify_bell(future.queue, delayable=future.delayable)
    return _Inserted.YES


def _first(future: Future) -> Future | None:
    """The future that was submitted before under this one's names, if it still exists.

    Raises:
        SeqIdReused, IdempotencyKeyReused: It was another request.
    """
    submitted = Future.objects.without_bodies()
    if future.seq_id is not None:
        first = submitted.filter(lane_id=future.lane_id, seq_id=future.seq_id).first()
        if first is not None:
            if bytes(first.payload_digest) != future.payload_digest:
                raise SeqIdReused
            return first
    if future.idempotency_key is not None:
        first = submitted.filter(
            owner_id=future.owner_id, idempotency_key=future.idempotency_key
        ).first()
        if first is not None:
            if (
                bytes(first.payload_digest) != future.payload_digest
                or first.lane_id != future.lane_id
            ):
                raise IdempotencyKeyReused
            return first
    return None


def _renumber(future: Future) -> None:
    """Move the lane's own numbers past those its clients chose.

    Raises:
        SeqIdReused: The lane is ordered and goes on after this seq id.
    """
    if future.lane_id is None:
        return
    lane = Lane.objects.get(pk=future.lane_id)
    if future.seq_id is None:
        highest = Future.objects.filter(lane=lane).aggregate(highest=Coalesce(Max("seq_id"), 0))
        Lane.objects.filter(pk=lane.pk).update(
            last_seq_id=Greatest(F("last_seq_id"), highest["highest"])
        )
    elif lane.ordered and future.seq_id < lane.next_seq_id:
        raise SeqIdReused(f"seq_id {future.seq_id}: this lane goes on at {lane.next_seq_id}.")


def future_cancel(*, request_id: str, owner_id: int) -> Future:
    """Cancel a future that waits, or runs and is interruptible, and return it.

    It is cancelled for good when this returns; cancelling twice is the same as once. Whoever
    runs it is told after the commit and may spend another moment on it. A worker that finishes
    it meanwhile finds that it came too late (``futures.cancelled``). Opens its own transaction.

    Raises:
        FutureNotFound: The owner has no such future. (404)
        FutureNotCancellable: It is finished, or it runs and must not be torn apart. (409)
    """
    future_of_owner = Future.objects.without_bodies().filter(pk=request_id, owner_id=owner_id)
    with transaction.atomic(using=alias()):
        cancelled = future_of_owner.cancellable().update(
            state=State.CANCELLED,
            # By the clock that also says when workers finish: cursors compare the two.
            finished_at=Now(),
        )
        future = future_of_owner.first()
        if future is None:
            raise FutureNotFound.named(request_id)
        if future.state != State.CANCELLED:
            raise FutureNotCancellable(*([] if future.is_final else [_NOT_TORN_APART]))
        if cancelled and future.worker_id is None:
            notify_finished_after_commit([request_id])
        elif cancelled:
            notify_cancelled_after_commit(request_id, queue=future.queue)
    return future


def future_resubmit(*, request_id: str) -> Future:
    """Submit a future's request again, at the end of its lane, as a new future.

    The new one names the first in ``replay_of``. Opens its own transaction.

    Raises:
        FutureNotFound: No such future. (404)
        FuturePayloadPruned: Its payload is gone. (410)
        LaneNumberedByClient: The server has numbered nothing in its lane. (409)
        QueueNotServed: No worker would come for it. (409)
    """
    futures = Future.objects.defer("result").select_related("lane")
    first = futures.filter(pk=request_id).first()
    if first is None:
        raise FutureNotFound.named(request_id)
    if first.payload is None:
        raise FuturePayloadPruned
    if first.lane is not None and first.lane.last_seq_id == 0:
        raise LaneNumberedByClient
    if not import_string(settings.FUTURES_QUEUE_IS_SERVED)(first.queue):
        raise QueueNotServed
    return future_submit(
        owner_id=first.owner_id,
        queue=first.queue,
        kind=first.kind,
        payload=EncodedPayload(bytes(first.payload), bytes(first.payload_digest)),
        lane_id=first.lane_id,
        cost=first.cost,
        interruptible=first.interruptible,
        replay_of=first,
    )
