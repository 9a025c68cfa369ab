"""How futures end without a result because of their owner: cancelled, or refused with their lane.

What a worker does about those that it held is in ``futures.cancelled``.
"""

from __future__ import annotations

from django.db import transaction
from django.db.models.functions import Now

from futures.database import alias
from futures.errors import FutureNotCancellable, FutureNotFound
from futures.models import Future
from futures.notify import notify_cancelled_after_commit, notify_finished_after_commit
from futures.services import Refusal
from futures.transitions import State

_NOT_TORN_APART = "It runs already, and what it changes is not torn apart: it goes on to its end."


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
