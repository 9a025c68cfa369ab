"""The audit log: functions that add to it, and one that reads it.

An event is written in the transaction of the recorded action, so that neither exists without
the other.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

from django.contrib.auth import get_user_model
from django.db.models import QuerySet
from django.utils import timezone

from training.models import AuditEvent, Checkpoint


def audit_record(
    event: str, *, actor_id: int | None, owner_id: int | None, **details: str | int | None
) -> None:
    """Record that ``actor_id`` did something to an object of ``owner_id``.

    Args:
        event: ``<thing>_<verb>``.
        actor_id: None for somebody at the console, or the server itself.
        details: The object: names and numbers, never a secret.
    """
    AuditEvent.objects.create(event=event, actor_id=actor_id, owner_id=owner_id, details=details)


def audit_checkpoint(
    verb: str, checkpoint: Checkpoint, *, actor_id: int | None, **more: Any
) -> None:
    """Record an action on a checkpoint."""
    audit_record(
        f"checkpoint_{verb}",
        actor_id=actor_id,
        owner_id=checkpoint.run.owner_id,
        tinker_path=str(checkpoint.path),
        model_id=checkpoint.run.name,
        **more,
    )


def audit_login(verb: Literal["succeeded", "failed"], *, username: str, address: str) -> None:
    """Record a login attempt to the admin under this name.

    A failed attempt has no actor, because the password was not the user's.
    """
    user = get_user_model().objects.filter(username=username).first()
    actor = user if verb == "succeeded" else None
    audit_record(
        f"login_{verb}",
        actor_id=actor.pk if actor else None,
        owner_id=user.pk if user else None,
        # An unknown name is not recorded: it may be a password typed into the wrong field.
        username=username if user else None,
        address=address,
    )


def audit_logged_in_lately(*, username: str, address: str, within: timedelta) -> bool:
    """Whether this user has logged in to the admin from this address recently."""
    return AuditEvent.objects.filter(
        owner__username=username,
        event="login_succeeded",
        created_at__gt=timezone.now() - within,
        details__address=address,
    ).exists()


def audit_events(
    *, owner_id: int | None, thing: str | None = None, day: date | None = None
) -> QuerySet[AuditEvent]:
    """Actions on the owner's objects, oldest first; ``owner_id`` None: on all objects.

    Args:
        thing: The first word of events, such as ``checkpoint``; None for all.
        day: A day of UTC.
    """
    events = AuditEvent.objects.select_related("actor", "owner").order_by("created_at", "pk")
    if owner_id is not None:
        events = events.filter(owner_id=owner_id)
    if thing is not None:
        events = events.filter(event__startswith=f"{thing}_")
    if day is not None:
        begin = datetime(day.year, day.month, day.day, tzinfo=UTC)
        events = events.filter(created_at__gte=begin, created_at__lt=begin + timedelta(days=1))
    return events


def audit_of(events: Collection[str], *, since: datetime, limit: int) -> list[AuditEvent]:
    """The newest of these events of all users since a moment, the newest first."""
    rows = AuditEvent.objects.filter(event__in=events, created_at__gte=since)
    return list(rows.order_by("-created_at")[:limit])


def audit_newest(*, limit: int) -> list[AuditEvent]:
    """The newest events of all users, the newest first."""
    return list(AuditEvent.objects.order_by("-pk")[:limit])
