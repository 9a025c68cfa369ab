"""The audit log: one function that adds to it, one that reads it.

An event is written in the transaction of what it tells of, so that neither is there without
the other.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

from django.contrib.auth import get_user_model
from django.db.models import QuerySet
from django.utils import timezone

from training.models import AuditEvent, Checkpoint


def audit_record(
    event: str, *, actor_id: int | None, owner_id: int | None, **details: str | int | None
) -> None:
    """Note that ``actor_id`` did something to what is ``owner_id``'s.

    Args:
        event: ``<thing>_<verb>``.
        actor_id: None for somebody at the console, or the server itself.
        details: What it was done to; names and numbers, never a secret.
    """
    AuditEvent.objects.create(event=event, actor_id=actor_id, owner_id=owner_id, details=details)


def audit_checkpoint(
    verb: str, checkpoint: Checkpoint, *, actor_id: int | None, **more: Any
) -> None:
    """Note what was done to a checkpoint."""
    audit_record(
        f"checkpoint_{verb}",
        actor_id=actor_id,
        owner_id=checkpoint.run.owner_id,
        tinker_path=str(checkpoint.path),
        model_id=checkpoint.run.name,
        **more,
    )


def audit_login(verb: Literal["succeeded", "failed"], *, username: str, address: str) -> None:
    """Note that somebody asked to be let into the admin under this name.

    A failure's actor is nobody: its password was not the user's.
    """
    user = get_user_model().objects.filter(username=username).first()
    actor = user if verb == "succeeded" else None
    audit_record(
        f"login_{verb}",
        actor_id=actor.pk if actor else None,
        owner_id=user.pk if user else None,
        # Of a name that nobody has, nothing: it may be a password that was typed a field too early.
        username=username if user else None,
        address=address,
    )


def audit_logged_in_lately(*, username: str, address: str, within: timedelta) -> bool:
    """Whether this user was let into the admin from this address lately."""
    return AuditEvent.objects.filter(
        owner__username=username,
        event="login_succeeded",
        created_at__gt=timezone.now() - within,
        details__address=address,
    ).exists()


def audit_events(
    *, owner_id: int | None, thing: str | None = None, day: date | None = None
) -> QuerySet[AuditEvent]:
    """What was done to the owner's things, the oldest first; ``owner_id`` None: to anybody's.

    Args:
        thing: The first word of events, such as ``checkpoint``; None for all.
        day: Of UTC.
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
