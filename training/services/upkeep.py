"""Changes of saved checkpoints: publish, set a time to live, delete.

Each function is one statement or its own transaction. Only the owner may change a checkpoint;
for other users it does not exist, public or not.
"""

from __future__ import annotations

from datetime import timedelta

from django.db import transaction
from django.db.models import Exists, OuterRef, Q, QuerySet
from django.utils import timezone

from futures.models import Future
from futures.transitions import State
from training.audit import audit_checkpoint
from training.client_silence import ENDS_CHECKPOINTS
from training.errors import CheckpointNotFound, InvalidRequest
from training.models import Checkpoint
from training.paths import TinkerPath
from training.selectors import checkpoint_own, directories_named
from training.storage.chosen import storage
from training.storage.interface import AREAS, StoredFolder

MIN_TTL_SECONDS = 3600
MAX_TTL_SECONDS = 10 * 365 * 24 * 3600

UNUSED = timedelta(hours=1)
"""A training loop makes a sampling session at every step and leaves the last one behind: superseded
weights that nobody sampled from for this long are deleted."""

UNNAMED = timedelta(days=1)
"""Longer than any folder waits for its row."""

AFTER_FINISH = timedelta(minutes=15)
"""How long a finished session's last samples may still need its weights."""


@transaction.atomic
def checkpoint_publish(
    *, owner_id: int, path: TinkerPath, public: bool, actor_id: int | None = None
) -> Checkpoint:
    """Let everybody read a checkpoint, or only its owner; a repeat has no effect.

    Others find it under ``Checkpoint.global_path``.

    Args:
        actor_id: The user who asked for it, if not the owner.

    Raises:
        CheckpointNotFound: (404)
    """
    checkpoint = checkpoint_own(owner_id=owner_id, path=path)
    if Checkpoint.objects.filter(pk=checkpoint.pk, public=not public).update(public=public):
        verb = "publish" if public else "unpublish"
        audit_checkpoint(verb, checkpoint, actor_id=owner_id if actor_id is None else actor_id)
    checkpoint.public = public
    return checkpoint


@transaction.atomic
def checkpoint_set_ttl(
    *, owner_id: int, path: TinkerPath, ttl_seconds: int | None, actor_id: int | None = None
) -> None:
    """Delete a checkpoint after this many seconds, or never (None).

    Args:
        actor_id: The user who asked for it, if not the owner.

    Raises:
        CheckpointNotFound: (404)
        InvalidRequest: Less than an hour or more than ten years. (400)
    """
    if ttl_seconds is not None and not MIN_TTL_SECONDS <= ttl_seconds <= MAX_TTL_SECONDS:
        raise InvalidRequest(
            f"ttl_seconds: expected null or {MIN_TTL_SECONDS} to {MAX_TTL_SECONDS}; "
            f"got {ttl_seconds}"
        )
    checkpoint = checkpoint_own(owner_id=owner_id, path=path)
    expires_at = None if ttl_seconds is None else timezone.now() + timedelta(seconds=ttl_seconds)
    Checkpoint.objects.filter(pk=checkpoint.pk).update(expires_at=expires_at)
    actor_id = owner_id if actor_id is None else actor_id
    audit_checkpoint("set_ttl", checkpoint, actor_id=actor_id, ttl_seconds=ttl_seconds)


def checkpoint_remove(*, owner_id: int, path: TinkerPath) -> None:
    """Delete the owner's checkpoint at this path.

    Raises:
        CheckpointNotFound: (404)
    """
    checkpoint = checkpoint_own(owner_id=owner_id, path=path)
    if not checkpoint_delete(checkpoint_id=checkpoint.pk, actor_id=owner_id):
        raise CheckpointNotFound(f"no checkpoint at {path}")


def checkpoint_delete(
    *, checkpoint_id: int, actor_id: int | None = None, among: QuerySet[Checkpoint] | None = None
) -> bool:
    """Delete a checkpoint: the row first, so that it cannot be found, then its files.

    A crash in between leaves files that no row refers to, never a row without files. Returns
    whether this call did it.

    Args:
        actor_id: The user who asked for it; None for the server itself, after it expired.
        among: It is deleted only if it is still one of these.
    """
    with transaction.atomic():
        rows = Checkpoint.objects.all() if among is None else among
        locked = rows.select_for_update(of=("self",)).select_related("run")
        checkpoint = locked.filter(pk=checkpoint_id).first()
        if checkpoint is None:
            return False
        if not checkpoint.ephemeral:
            audit_checkpoint("delete", checkpoint, actor_id=actor_id)
        checkpoint.delete()
    storage().delete(checkpoint.directory)
    return True


def checkpoints_expire() -> int:
    """Delete expired checkpoints; return their number. The worker calls it when idle.

    An ephemeral one is deleted with its session, some time after that was finished or fell silent;
    or earlier, if a newer one of the same run exists and nobody samples from it any more. The files
    of an import are deleted when its requests are finished.
    """
    now = timezone.now()
    newer = Checkpoint.objects.filter(
        run_id=OuterRef("run_id"), ephemeral=True, created_at__gt=OuterRef("created_at")
    )
    samples = Future.objects.filter(lane_id=OuterRef("samplingsession__pk"))
    used = samples.filter(
        Q(created_at__gt=now - UNUSED) | Q(state__in=[State.PENDING, State.RUNNING])
    )
    left_behind = Q(created_at__lte=now - UNUSED) & Exists(newer) & ~Exists(used)
    session_over = Q(run__session__finished_at__lte=now - AFTER_FINISH) | Q(
        run__session__heartbeat_at__lte=now - ENDS_CHECKPOINTS
    )
    importing = Future.objects.filter(
        lane_id=OuterRef("run_id"), state__in=[State.PENDING, State.RUNNING]
    )
    imported = Q(kind=Checkpoint.Kind.EXTERNAL) & ~Exists(importing)
    expired = Checkpoint.objects.filter(
        Q(expires_at__lte=now) | (Q(ephemeral=True) & (session_over | left_behind | imported))
    )
    found = list(expired.values_list("pk", flat=True))
    # Asked again one by one: files take time to delete, and a session may be used again meanwhile.
    return sum(checkpoint_delete(checkpoint_id=pk, among=expired) for pk in found)


def folders_unnamed() -> list[StoredFolder]:
    """Folders of checkpoints and snapshots that no row of this database refers to.

    A process that dies between writing files and committing their row leaves such a folder, and so
    does one that dies between deleting a row and its files. A folder younger than ``UNNAMED`` may
    still be waiting for its row. Nothing is deleted here or by any worker: with another
    database, every folder would look like one of these.
    """
    youngest = (timezone.now() - UNNAMED).timestamp()
    listed = [folder for area in AREAS for folder in storage().folders(area)]
    # Read after the listing, so that folders recorded meanwhile are included.
    named = directories_named()
    return [f for f in listed if f.changed_at < youngest and f.directory not in named]
