"""The reason why a request waits, for its owner: the queue's state, or a base model that is not
served."""

from __future__ import annotations

from dataclasses import replace

from django.conf import settings

from futures.models import Future
from futures.queue_positions import QueuePosition, future_position
from futures.selectors import PAUSED
from training.base_models import queue_is_served
from training.models import Run


def future_waiting(future: Future) -> QueuePosition:
    """The position of a future that is not final, and the reason for waiting.

    A future whose base model is not served any more is kept: it runs once a server
    on this data serves the model again.
    """
    found = future_position(future, gap_seconds=settings.GAP_SECONDS)
    if waits_for_nobody(future):
        name = Run.objects.filter(id=future.lane_id).values_list("base_model", flat=True).first()
        reason = (
            f"This server does not serve {f'base model {name}' if name else 'its base model'} any "
            "more; the request runs once it is served again."
        )
        return replace(found, estimated_wait_seconds=None, state=PAUSED, reason=reason)
    return found


def waits_for_nobody(future: Future) -> bool:
    """Whether no worker of this server will ever run it; uses no database."""
    return not future.is_final and not queue_is_served(future.queue)
