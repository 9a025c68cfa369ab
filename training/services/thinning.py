"""Deletes all but the newest checkpoints of each run, if the operator asks for it.

``TINKERAPI_KEEP_CHECKPOINTS`` counts each kind of a run's checkpoints separately. Published ones
stay, and so does every checkpoint for its first hour, in which the client that saved it may load it
by its path.
"""

from __future__ import annotations

from datetime import timedelta

from django.conf import settings
from django.db.models import F, Window
from django.db.models.functions import RowNumber
from django.utils import timezone

from training.models import Checkpoint
from training.services.upkeep import checkpoint_delete

KEPT_AT_LEAST = timedelta(hours=1)


def checkpoints_superseded(keep: int) -> list[int]:
    """The checkpoints that are older than the newest ``keep`` of their run and kind."""
    newest_first = Window(
        RowNumber(), partition_by=[F("run_id"), F("kind")], order_by=[F("created_at").desc()]
    )
    numbered = Checkpoint.objects.filter(ephemeral=False).annotate(number=newest_first)
    old = numbered.filter(number__gt=keep)
    return [
        checkpoint.pk
        for checkpoint in old.only("pk", "public", "created_at")
        if not checkpoint.public and checkpoint.created_at < timezone.now() - KEPT_AT_LEAST
    ]


def checkpoints_thin() -> int:
    """Delete what ``TINKERAPI_KEEP_CHECKPOINTS`` does not keep; return the number."""
    if not settings.KEEP_CHECKPOINTS:
        return 0
    superseded = checkpoints_superseded(settings.KEEP_CHECKPOINTS)
    return sum(checkpoint_delete(checkpoint_id=pk) for pk in superseded)
