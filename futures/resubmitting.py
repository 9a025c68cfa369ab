"""Submits a future's request again, for people who look for the cause of a failure."""

from __future__ import annotations

from django.conf import settings
from django.utils.module_loading import import_string

from futures.errors import FutureNotFound, FuturePayloadPruned, LaneNumberedByClient, QueueNotServed
from futures.models import Future
from futures.payload import EncodedPayload
from futures.services import future_submit


def future_resubmit(*, request_id: str) -> Future:
    """Submit a future's request again, at the end of its lane, as a new future.

    The new one refers to the first in ``replay_of``. Opens its own transaction.

    Raises:
        FutureNotFound: No such future. (404)
        FuturePayloadPruned: Its payload was pruned. (410)
        LaneNumberedByClient: The client numbers the requests of its lane. (409)
        QueueNotServed: No worker serves its queue. (409)
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
