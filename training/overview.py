"""Reads over many runs, of one owner or (``owner_id`` None) of all."""

from __future__ import annotations

from typing import Any

from django.db.models import OuterRef, QuerySet, Subquery, Sum

from futures.models import Future
from training.models import Checkpoint, Run, Snapshot
from training.progress import with_progress


def runs_newest(owner_id: int | None, *, limit: int) -> list[Any]:
    """The live runs with the newest requests, with their owners and their progress
    (``with_progress``)."""
    runs = Run.objects.live()
    runs = runs if owner_id is None else runs.owned_by(owner_id)
    newest = with_progress(runs).select_related("owner", "session").order_by("-newest_request_at")
    return list(newest[:limit])


def run_find_one(run_id: str, *, owner_id: int | None) -> Run | None:
    """The run with this id, removed or not; None if it does not exist or belongs to another
    owner."""
    runs = Run.objects.all() if owner_id is None else Run.objects.owned_by(owner_id)
    return runs.filter(pk=run_id).first()


def bytes_saved(owner_id: int | None) -> dict[str, int]:
    """The size of checkpoints and snapshots."""
    of_owner = {} if owner_id is None else {"run__owner": owner_id}
    return {
        name: rows.filter(**of_owner).aggregate(size=Sum("size_bytes"))["size"] or 0
        for name, rows in (("checkpoints", Checkpoint.objects), ("snapshots", Snapshot.objects))
    }


def checkpoints_listed(run: Run, *, limit: int) -> list[Checkpoint]:
    """A run's last checkpoints without those of sampling sessions, the last one first."""
    return list(run.checkpoints.filter(ephemeral=False).order_by("-created_at")[:limit])


def snapshots_newest(run: Run, *, limit: int) -> list[Snapshot]:
    """A run's last snapshots, the last one first."""
    return list(run.snapshots.order_by("-seq_id")[:limit])


def with_run_names(futures: QuerySet[Future]) -> QuerySet[Any]:
    """The futures with ``run_name``, the name of their lane's run, or None."""
    run = Run.objects.filter(pk=OuterRef("lane_id"))
    return futures.annotate(run_name=Subquery(run.values("name")[:1]))


def run_ids_named(name: str) -> list[str]:
    """The ids of all runs of this name, of all owners, live or not."""
    return list(Run.objects.filter(name=name).values_list("pk", flat=True))
