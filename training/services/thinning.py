"""Deletes all but the newest checkpoints of each run, if the operator asks for it.

``TINKERAPI_KEEP_CHECKPOINTS`` counts each kind of a run's checkpoints separately. Published ones
stay, and so does every checkpoint for its first hour, in which the client that saved it may load it
by its path.
"""

from __future__ import annotations

from datetime import timedelta

from django.conf import settings
from django.db.models import Exists, F, OuterRef, QuerySet, Window
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
    old = numbered.filter(number__gt=keep).order_by("created_at")
    return [
        checkpoint.pk
        for checkpoint in old.only("pk", "public", "created_at")
        if not checkpoint.public and checkpoint.created_at < timezone.now() - KEPT_AT_LEAST
    ]


def _still_superseded(keep: int) -> QuerySet[Checkpoint]:
    """The same for one row that is locked, which a window function cannot be."""
    newer = Checkpoint.objects.filter(
        run_id=OuterRef("run_id"),
        kind=OuterRef("kind"),
        ephemeral=False,
        created_at__gt=OuterRef("created_at"),
    )
    last_kept = newer.order_by("created_at").values("pk")[keep - 1 : keep]
    return Checkpoint.objects.filter(Exists(last_kept), public=False)


def checkpoints_thin() -> int:
    """Delete what ``TINKERAPI_KEEP_CHECKPOINTS`` does not keep; return the number."""
    if not settings.KEEP_CHECKPOINTS:
        return 0
    superseded = checkpoints_superseded(settings.KEEP_CHECKPOINTS)
    # Files take time to delete: meanwhile one may be published, or a newer one deleted.
    still = _still_superseded(settings.KEEP_CHECKPOINTS)
    return sum(checkpoint_delete(checkpoint_id=pk, among=still) for pk in superseded)
