"""How requests become futures: make lanes, and submit to them.

Other actions of owners are in ``futures.cancelling`` and ``futures.resubmitting``; those of workers
in ``futures.claiming``, ``futures.finishing`` and ``futures.workers``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db.models import F, Max
from django.db.models.functions import Coalesce, Greatest
from django.utils import timezone

from futures.errors import (
    IdempotencyKeyReused,
    QueueFull,
    SeqIdReused,
)
from futures.insertion import Inserted, insert
from futures.models import Future, Lane
from futures.payload import EncodedPayload, encode_payload
from futures.plain import plain_text
from futures.transitions import Category, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request will never run."""

    error: str
    category: Category = Category.USER
    error_code: str = ""
    """Class name of the domain error."""


def lane_create(
    *, lane_id: str, owner_id: int, queue: str, ordered: bool = True, first_seq_id: int = 1
) -> Lane:
    """Make a lane that begins at ``first_seq_id``. Raises IntegrityError if the id is taken."""
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
    result: bytes | None = None,
) -> Future:
    """Record a request and return its future; asking twice returns the same one.

    (lane, seq_id) names one logical request, and so does (owner, idempotency_key): a client
    that lost our answer may send it again, in whatever state the first one is. Opens its own
    transaction; the worker is woken after the outermost one commits.

    Args:
        owner_id: The user that it belongs to.
        queue: The engine queue whose worker runs it.
        kind: The operation; this app does not interpret it.
        payload: A value that ``futures.payload.encode`` takes, or an EncodedPayload.
        lane_id: An existing lane, or None for a request that may run at any time.
        seq_id: The client's number; with None the server assigns the lane's next one.
        idempotency_key: The client's name for this request.
        cost: Estimated tokens of work.
        delayable: A worker may delay it a moment for batch-mates.
        interruptible: It changes nothing but its own result, so it may be cancelled while it runs.
        summary: Small facts for lists and charts.
        replay_of: The future whose request this one repeats.
        max_pending: How many futures of the owner may wait. Concurrent submissions may exceed
            it by their number.
        refusal: The request is invalid but has used its seq id: its future is failed
            from the start, and the lane continues after it.
        result: Recording the request completes it: its future is ready from the start.

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
        future.state, future.result, future.finished_at = State.READY, result, now
    while True:
        inserted = insert(future, max_pending)
        if inserted == Inserted.YES:
            return future
        first = _first(future)
        if first is not None:
            return first
        if inserted == Inserted.FULL:
            raise QueueFull(
                f"{max_pending:,} of your requests wait, as many as one user may have; send this "
                "one again when some are done."
            )
        # The first one was rolled back, or a client has used the server's number in this lane.
        _renumber(future)


def future_repeated(
    *,
    payload: EncodedPayload,
    owner_id: int,
    lane_id: str | None,
    seq_id: int | None,
    idempotency_key: str | None,
) -> Future | None:
    """The future of this request if it was submitted before; for requests that cannot be submitted
    now.

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
    payload: EncodedPayload,
    result: bytes,
    idempotency_key: str,
    summary: dict[str, Any] | None = None,
) -> Future:
    """A future without a lane that is ready from the start; asking twice returns the same one.

    For requests that are complete once recorded, of clients that expect a future. Runs in
    the caller's transaction.

    Raises:
        IdempotencyKeyReused: The key exists with another lane, kind or payload.
    """
    now = timezone.now()
    future = Future(
        owner_id=owner_id,
        queue=queue,
        kind=kind,
        state=State.READY,
        payload=payload.data,
        payload_digest=payload.digest,
        result=result,
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


def _first(future: Future) -> Future | None:
    """The earlier future with this one's seq id or idempotency key, if it still exists.

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
    """Move the server's numbering of the lane past the numbers that clients chose.

    Raises:
        SeqIdReused: The lane is ordered and is already past this seq id.
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
        raise SeqIdReused(f"seq_id {future.seq_id}: this lane continues at {lane.next_seq_id}.")
