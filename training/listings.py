"""Reads for lists: an owner's runs, checkpoints and sessions, a page at a time, newest first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db.models import Count, F, Q, QuerySet, Sum
from django.utils import timezone

from training.errors import RunNotFound
from training.models import Checkpoint, Run, Session
from training.progress import with_progress
from training.selectors import checkpoints_kept

ACTIVE = timedelta(minutes=5)
"""A session with a heartbeat this recent is active; clients send one every ten seconds."""

LISTED = Q(ephemeral=False)


@dataclass(frozen=True, kw_only=True)
class Page:
    """The position of a page in its list."""

    offset: int
    limit: int
    total_count: int


def runs_listed(owner_id: int) -> QuerySet[Run]:
    """The owner's runs, with the owner's row loaded.

    Runs of SDK sessions stay listed when they are removed, as their checkpoints stay. A removed
    run of the quick reference may share its name with a live one, so it is left out.
    """
    runs = Run.objects.owned_by(owner_id).select_related("owner")
    return runs.filter(Q(session__isnull=False) | Q(deleted_at__isnull=True))


def run_page(
    *, owner_id: int, offset: int, limit: int, project_id: str | None = None
) -> tuple[list[Any], Page]:
    """Runs, each with ``newest_request_at``, and their position in the whole list."""
    runs = runs_listed(owner_id)
    if project_id is not None:
        runs = runs.filter(session__project_id=project_id)
    ordered = with_progress(runs).order_by("-created_at", "-id")
    page = Page(offset=offset, limit=limit, total_count=runs.count())
    return list(ordered[offset : offset + limit]), page


def run_described(*, owner_id: int, run_name: str) -> Any:
    """The owner's run of this name, the live one before removed ones, or the one of this id; with
    ``newest_request_at``.

    Raises:
        RunNotFound: (404)
    """
    runs = with_progress(Run.objects.owned_by(owner_id).select_related("owner"))
    newest_first = F("deleted_at").desc(nulls_first=True)
    named = runs.filter(name=run_name).order_by(newest_first)
    run = named.first() or runs.filter(id=run_name).first()
    if run is None:
        raise RunNotFound(f"training_run_id: no model named {run_name[:200]!r}")
    return run


def newest_checkpoints(runs: Iterable[Run]) -> dict[tuple[str, str], Checkpoint]:
    """Run id and kind -> the newest listed checkpoint, in one query."""
    newest = (
        checkpoints_kept()
        .filter(LISTED, run__in=list(runs))
        .order_by("run_id", "kind", "-created_at")
        .distinct("run_id", "kind")
    )
    return {(checkpoint.run_id, checkpoint.kind): checkpoint for checkpoint in newest}


def samplers_listed(owner_id: int) -> list[Checkpoint]:
    """The owner's checkpoints that have a path and can be sampled from, newest first."""
    found = checkpoints_kept().filter(LISTED, run__owner_id=owner_id, kind=Checkpoint.Kind.SAMPLER)
    return list(found.select_related("run__owner").order_by("-created_at", "-id"))


def checkpoints_of_run(*, owner_id: int, run_name: str) -> list[Checkpoint]:
    """All listed checkpoints of the owner's runs of this name, and of the run of this id.

    Raises:
        RunNotFound: (404)
    """
    run_described(owner_id=owner_id, run_name=run_name)
    asked_for = Q(run__name=run_name) | Q(run_id=run_name)
    listed = checkpoints_kept().filter(LISTED, asked_for, owner_id=owner_id)
    return list(listed.order_by("-created_at", "-pk"))


def checkpoint_page(*, owner_id: int, offset: int, limit: int) -> tuple[list[Checkpoint], Page]:
    """The owner's listed checkpoints of all runs."""
    listed = checkpoints_kept().filter(LISTED, owner_id=owner_id)
    page = Page(offset=offset, limit=limit, total_count=listed.count())
    return list(listed.order_by("-created_at", "-pk")[offset : offset + limit]), page


def session_ids(*, owner_id: int, offset: int, limit: int) -> list[str]:
    """Ids of the owner's sessions."""
    sessions = Session.objects.filter(owner_id=owner_id).order_by("-created_at", "-id")
    return list(sessions.values_list("id", flat=True)[offset : offset + limit])


def sessions_by_id(ids: Iterable[str]) -> list[Session]:
    """These sessions; the caller has checked their owner."""
    return list(Session.objects.filter(id__in=list(ids)).order_by("id"))


@dataclass(frozen=True, kw_only=True)
class SessionStatus:
    """One of the states in which a search looks for sessions."""

    is_finished: bool
    """If false: with a recent heartbeat."""
    reasons: Sequence[str] | None = None
    """Reasons of finished ones; None matches all."""

    def condition(self) -> Q:
        """The filter for sessions."""
        if not self.is_finished:
            return Q(finished_at__isnull=True, heartbeat_at__gt=timezone.now() - ACTIVE)
        reasons = Q() if self.reasons is None else Q(finish_reason__in=self.reasons)
        return Q(finished_at__isnull=False) & reasons


def session_search(
    *,
    owner_id: int,
    limit: int,
    session_id: str | None = None,
    display_name: str | None = None,
    project_ids: Sequence[str] | None = None,
    user_metadata: dict[str, str] | None = None,
    statuses: Sequence[SessionStatus] | None = None,
    after: tuple[datetime, str] | None = None,
) -> list[Any]:
    """The owner's sessions that match all arguments, with ``checkpoints_count`` and
    ``checkpoint_bytes``.

    Args:
        session_id: This session; together with ``display_name`` either may match.
        display_name: Words, all of which the name must contain, ignoring case.
        statuses: Any of these; an empty list matches nothing.
        after: Time and id of the last session of the previous page.
    """
    sessions = Session.objects.filter(owner_id=owner_id)
    named = Q()
    if display_name is not None:
        for word in display_name.split():
            named &= Q(display_name__icontains=word)
    if session_id is not None:
        named = Q(id=session_id) | named if display_name is not None else Q(id=session_id)
    sessions = sessions.filter(named)
    if project_ids is not None:
        sessions = sessions.filter(project_id__in=project_ids)
    if user_metadata:
        sessions = sessions.filter(user_metadata__contains=user_metadata)
    if statuses is not None:
        matching = Q(pk__in=[])
        for status in statuses:
            matching |= status.condition()
        sessions = sessions.filter(matching)
    if after is not None:
        moment, last_id = after
        sessions = sessions.filter(Q(created_at__lt=moment) | Q(created_at=moment, id__lt=last_id))
    kept = Q(runs__checkpoints__ephemeral=False) & (
        Q(runs__checkpoints__expires_at__isnull=True)
        | Q(runs__checkpoints__expires_at__gt=timezone.now())
    )
    counted = sessions.select_related("owner").annotate(
        checkpoints_count=Count("runs__checkpoints", filter=kept),
        checkpoint_bytes=Sum("runs__checkpoints__size_bytes", filter=kept),
    )
    return list(counted.order_by("-created_at", "-id")[:limit])
