"""How an owner ends futures without a result: by cancelling one, or refusing a whole lane.

``futures.cancelled`` handles the futures that a worker held.
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

_NOT_INTERRUPTIBLE = "It is already running and changes state, so it cannot be interrupted."


def future_cancel(*, request_id: str, owner_id: int) -> Future:
    """Cancel a future that is waiting, or running and interruptible, and return it.

    It is final when this returns; cancelling twice has the same effect as once. The worker that
    runs it is told after the commit and may spend another moment on it. If the worker finishes
    it meanwhile, that result is dropped (``futures.cancelled``). Opens its own transaction.

    Raises:
        FutureNotFound: The owner has no such future. (404)
        FutureNotCancellable: It is finished, or it is running and not interruptible. (409)
    """
    future_of_owner = Future.objects.without_bodies().filter(pk=request_id, owner_id=owner_id)
    with transaction.atomic(using=alias()):
        cancelled = future_of_owner.cancellable().update(
            state=State.CANCELLED,
            # By the clock that also dates workers' results: cursors compare the two times.
            finished_at=Now(),
        )
        future = future_of_owner.first()
        if future is None:
            raise FutureNotFound.named(request_id)
        if future.state != State.CANCELLED:
            raise FutureNotCancellable(*([] if future.is_final else [_NOT_INTERRUPTIBLE]))
        if cancelled and future.worker_id is None:
            notify_finished_after_commit([request_id])
        elif cancelled:
            notify_cancelled_after_commit(request_id, queue=future.queue)
    return future


def lane_refuse(*, lane_id: str, refusal: Refusal, but: str) -> int:
    """Fail every open future of a lane that no worker will serve again, except one kind;
    return the number.

    A worker that is running one of them finds that its epoch no longer holds it and commits
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
