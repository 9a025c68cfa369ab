"""Reads of runs and checkpoints, usually for one owner."""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce
from operator import or_

from django.db.models import F, OuterRef, Q, QuerySet, Subquery
from django.db.models.functions import Coalesce
from django.utils import timezone

from futures.database import row_get
from futures.models import Future
from futures.transitions import State
from training.client_silence import FREES_MEMORY
from training.errors import (
    CheckpointNotFound,
    InvalidRequest,
    RunLost,
    RunNotFound,
    SamplingSessionNotFound,
    SessionNotFound,
)
from training.kinds import LOGGED, REQUESTS
from training.models import Checkpoint, CustomLoss, Run, SamplingSession, Session, Snapshot
from training.paths import TinkerPath


def session_get(*, owner_id: int, session_id: str) -> Session:
    """The owner's session.

    Raises:
        SessionNotFound: It does not exist, or belongs to another owner. (404)
    """
    session = Session.objects.filter(owner_id=owner_id, id=session_id).first()
    if session is None:
        raise SessionNotFound(f"session_id: no session {session_id[:64]!r}")
    return session


def sampling_session_get(*, owner_id: int, sampling_session_id: str) -> SamplingSession:
    """The owner's sampling session, with its session.

    Raises:
        SamplingSessionNotFound: It does not exist, or belongs to another owner. (404)
    """
    found = SamplingSession.objects.select_related("session").filter(
        session__owner_id=owner_id, id=sampling_session_id
    )
    if sampling_session := found.first():
        return sampling_session
    raise SamplingSessionNotFound(
        f"sampling_session_id: no sampling session {sampling_session_id[:120]!r}"
    )


def lanes_without_client(lane_ids: Collection[str]) -> set[str]:
    """The given lanes, of runs and of sampling sessions, whose session is finished or has not
    sent heartbeats for a while. Lanes without a session are not included."""
    silent = timezone.now() - FREES_MEMORY
    gone = Q(session__finished_at__isnull=False) | Q(session__heartbeat_at__lt=silent)
    return {
        lane_id
        for rows in (Run.objects, SamplingSession.objects)
        for lane_id in rows.filter(gone, id__in=lane_ids).values_list("id", flat=True)
    }


def custom_loss_get(*, session_id: str | None, loss_id: str) -> CustomLoss:
    """The loss that was uploaded in this session under this id.

    Raises:
        InvalidRequest: It does not exist, or belongs to another session. (400)
    """
    prefix, _, seq_id = loss_id.rpartition(":loss:")
    if session_id is not None and prefix == session_id and seq_id.isdecimal():
        found = CustomLoss.objects.filter(session_id=session_id, seq_id=int(seq_id)).first()
        if found is not None:
            return found
    raise InvalidRequest(f"loss_id: this session has no custom loss {loss_id[:120]!r}")


def run_list(*, owner_id: int) -> QuerySet[Run]:
    """The owner's live runs with their sessions, newest first."""
    return Run.objects.owned_by(owner_id).live().select_related("session").order_by("-created_at")


def run_get(*, owner_id: int, model_id: str) -> Run:
    """The owner's live run of this name.

    Raises:
        RunNotFound: It does not exist, or belongs to another owner. (404)
    """
    run = run_live(owner_id=owner_id, name=model_id)
    if run is None:
        last = Run.objects.owned_by(owner_id).filter(name=model_id).order_by("-created_at").first()
        why = f": it could not be created: {last.error}" if last and last.error else ""
        raise RunNotFound(f"model_id: no model named {model_id!r}{why}")
    return run


def run_live(*, owner_id: int, name: str) -> Run | None:
    """The owner's live run of this name, with its session; None if there is none."""
    run = row_get(
        Run,
        "owner_id = %(owner_id)s AND name = %(name)s AND deleted_at IS NULL",
        {"owner_id": owner_id, "name": name},
    )
    if run is not None and run.session_id is not None:
        run.session = row_get(Session, "id = %(id)s", {"id": run.session_id})
    return run


def run_find(identifier: str, *, owner: str | None = None) -> Run:
    """Any user's run by id, or the one live run of this name. For people at the console.

    Args:
        owner: User name, to choose between users with a run of this name.

    Raises:
        RunNotFound: None or several match.
    """
    found = Run.objects.filter(Q(id=identifier) | Q(name=identifier, deleted_at__isnull=True))
    if owner is not None:
        found = found.filter(owner__username=owner)
    runs = list(found.select_related("owner")[:2])
    if not runs:
        raise RunNotFound(f"no run {identifier!r}")
    if len(runs) > 1:
        raise RunNotFound(f"several users have a run named {identifier!r}; say --owner or its id")
    return runs[0]


CHANGED_ITS_RUN = reduce(
    or_,
    (
        Q(state=State.FAILED, kind=kind, error_code=error.__name__)
        for kind, request in REQUESTS.items()
        for error in request.logged_errors
    ),
    Q(state=State.READY, kind__in=LOGGED),
)
"""The futures that changed a run's state. They include one kind of failure: a step that had to
drop the gradient."""


def run_log(run: Run, *, after_seq_id: int = -1) -> list[Future]:
    """The requests of the run's log, in order, payloads included.

    Args:
        after_seq_id: Leaves out the requests that a snapshot covers; seq ids begin at 0.

    Raises:
        RunLost: A part of the log was pruned.
    """
    log = list(
        Future.objects.filter(
            CHANGED_ITS_RUN,
            lane_id=run.id,
            seq_id__gt=after_seq_id,
            seq_id__lte=run.applied_seq_id,
        )
        .defer("result")
        .select_related("worker")
        .order_by("seq_id")
    )
    if any(future.payload is None for future in log):
        raise RunLost("a part of its log was pruned, so it cannot be replayed")
    return log


def checkpoint_get(
    *,
    owner_id: int,
    path: TinkerPath,
    lender_id: int | None = None,
    with_files: bool = False,
    field: str = "path",
) -> Checkpoint:
    """A checkpoint that the owner may read: their own, the lender's, or a public one.

    Run names are only unique per owner, so another user's public checkpoint is addressed by the
    run's id. Owners may use that path too.

    Args:
        lender_id: Another user, who gave the owner a key to read their checkpoints.
        with_files: Also find exports for other programs, which the engine cannot read.
        field: The sender's name of the path field.

    Raises:
        CheckpointNotFound: It does not exist or has expired. (404)
        InvalidRequest: It is an export for other programs. (400)
    """
    if path.kind == Checkpoint.Kind.EXTERNAL and not with_files:
        raise InvalidRequest(
            f"{field}: {path} is for other programs; load or sample a weights or sampler_weights "
            "path"
        )
    named = checkpoints_kept().filter(kind=path.kind, name=path.name, ephemeral=False)
    readers = [owner_id] if lender_id is None else [owner_id, lender_id]
    readable = [
        condition
        for reader in readers
        for condition in (
            Q(owner_id=reader, path_run=path.run),
            Q(owner_id=reader, run_id=path.run),
        )
    ]
    for condition in [*readable, Q(public=True, run_id=path.run)]:
        if checkpoint := named.filter(condition).first():
            return checkpoint
    raise CheckpointNotFound(f"no checkpoint at {path}")


def checkpoint_own(*, owner_id: int, path: TinkerPath) -> Checkpoint:
    """The owner's own checkpoint at this path, of any kind.

    Raises:
        CheckpointNotFound: It does not exist, has expired, or belongs to another owner. (404)
    """
    checkpoint = checkpoint_get(owner_id=owner_id, path=path, with_files=True)
    if checkpoint.run.owner_id != owner_id:
        raise CheckpointNotFound(f"no checkpoint at {path}")
    return checkpoint


def checkpoint_at(*, owner_id: int, path: TinkerPath) -> Checkpoint | None:
    """The checkpoint at this path of the owner, with its run; None if the path is free.

    An expired checkpoint keeps its path until it is deleted, but a new one may replace it.
    """
    return (
        Checkpoint.objects.select_related("run")
        .filter(
            owner_id=owner_id,
            path_run=path.run,
            kind=path.kind,
            name=path.name,
            ephemeral=False,
        )
        .first()
    )


def checkpoint_by_id(checkpoint_id: int) -> Checkpoint:
    """The checkpoint of this primary key, of any owner.

    Raises:
        CheckpointNotFound: It was deleted or has expired. (404)
    """
    checkpoint = checkpoints_kept().filter(pk=checkpoint_id).first()
    if checkpoint is None:
        raise CheckpointNotFound
    return checkpoint


def checkpoints_kept() -> QuerySet[Checkpoint]:
    """All checkpoints that have not expired, with their runs."""
    return Checkpoint.objects.filter(
        Q(expires_at__isnull=True) | Q(expires_at__gt=timezone.now())
    ).select_related("run")


def directories_named() -> set[str]:
    """The folders of all checkpoints and snapshots, by their names in the storage."""
    directories: set[str] = set(Checkpoint.objects.values_list("directory", flat=True))
    return directories | set(Snapshot.objects.values_list("directory", flat=True))


def newest_directories(number: int) -> list[str]:
    """The folders of the newest checkpoints and snapshots, this many of each at most."""
    return [
        directory
        for rows in (Checkpoint.objects, Snapshot.objects)
        for directory in rows.order_by("-pk").values_list("directory", flat=True)[:number]
    ]


def futures_prunable(futures: QuerySet[Future]) -> QuerySet[Future]:
    """Futures whose payload no recovery can need: they are covered by two snapshots, of which one
    may be unreadable.

    Futures outside the lane of a live run are always prunable, and so are those of a run whose
    session is finished. ``prunefutures`` calls this.
    """
    live = Run.objects.live().filter(id=OuterRef("lane_id"), session__finished_at__isnull=True)
    covered = (
        Snapshot.objects.filter(run_id=OuterRef("lane_id"))
        .order_by("-seq_id")
        .values("seq_id")[1:2]
    )
    return futures.annotate(
        live_run_id=Subquery(live.values("id")[:1]),
        covered_seq_id=Coalesce(Subquery(covered), -1),
    ).filter(Q(live_run_id__isnull=True) | Q(seq_id__lte=F("covered_seq_id")))
