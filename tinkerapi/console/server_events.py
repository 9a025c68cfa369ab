"""What happened to the server, the newest first: workers, backups, logins, keys.

All of it is read from rows that exist for other purposes; of each table only the newest rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby

from django.utils.safestring import SafeString

from futures.models import Worker
from futures.overview import worker_lives_newest
from tinkerapi.console.kit.display import duration, link, moment_text
from tinkerapi.server.last_backup import last_backup_at
from training.audit import audit_newest
from training.models import AuditEvent

LIVES = 20
AUDITED = 200
"""Newest audit events that are looked through for those below."""
AUDIT_TEXTS = {
    "login_failed": "a failed login",
    "key_create": "an API key was made",
    "key_revoke": "an API key was revoked",
    "key_rotate": "an API key was replaced",
    "checkpoint_publish": "a checkpoint was published",
}
BURST = timedelta(hours=1)
"""Equal events of the audit log within this time are one line."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of the feed."""

    at: datetime
    kind: str
    """One of ``tinkerapi.config.webhook.EVENTS``."""
    subject: str
    """Which row it is about; ``kind`` and ``subject`` together name the event."""
    text: str
    is_bad: bool = False
    link: SafeString | None = None

    @property
    def ago(self) -> str:
        """Its age in words."""
        return moment_text(self.at)


def events(*, for_operator: bool, limit: int) -> list[Event]:
    """The newest events.

    Args:
        for_operator: Also those of the audit log and of backups.
    """
    found = list(worker_events(worker_lives_newest(limit=LIVES)))
    if for_operator:
        found += _of_audit(audit_newest(limit=AUDITED))
        if (made_at := last_backup_at()) is not None:
            found.append(backup_event(made_at))
    return sorted(found, key=lambda event: event.at, reverse=True)[:limit]


def backup_event(made_at: datetime) -> Event:
    """The last backup."""
    text = "a backup was complete"
    return Event(at=made_at, kind="backup_made", subject=made_at.isoformat(), text=text)


def worker_events(lives: Sequence[Worker]) -> Iterable[Event]:
    """Starts and ends; a start says how long the queue had no worker.

    Args:
        lives: The newest first.
    """
    for place, worker in enumerate(lives):
        name = f"worker #{worker.pk} of {worker.figures.get('base_model', worker.queue)}"
        before = next((one for one in lives[place + 1 :] if one.queue == worker.queue), None)
        ended = None if before is None else before.stopped_at or before.heartbeat_at
        gap = ""
        if before is not None and ended is not None and worker.started_at > ended:
            gap = f", {duration(worker.started_at - ended)} after #{before.pk} ended"
        yield Event(
            at=worker.started_at,
            kind="worker_started",
            subject=str(worker.pk),
            text=f"{name} started{gap}",
            link=link(worker),
        )
        if worker.state in (Worker.WorkerState.STOPPED, Worker.WorkerState.LOST):
            is_lost = worker.state == Worker.WorkerState.LOST
            ended_at = worker.stopped_at or worker.heartbeat_at
            lived = duration(ended_at - worker.started_at)
            how = "was lost" if is_lost else "stopped"
            yield Event(
                at=ended_at,
                kind="worker_lost" if is_lost else "worker_stopped",
                subject=str(worker.pk),
                text=f"{name} {how} after {lived}",
                is_bad=is_lost,
                link=link(worker),
            )


def _of_audit(rows: list[AuditEvent]) -> Iterable[Event]:
    shown = [row for row in rows if row.event in AUDIT_TEXTS]
    for (event, _), group in groupby(shown, key=lambda row: (row.event, _whose(row))):
        burst: list[AuditEvent] = []
        for row in group:
            if burst and burst[0].created_at - row.created_at > BURST:
                yield audit_event(event, burst)
                burst = []
            burst.append(row)
        yield audit_event(event, burst)


def audit_event(event: str, rows: Sequence[AuditEvent]) -> Event:
    """Equal events, the newest first, as one."""
    times = f", {len(rows)} times" if len(rows) > 1 else ""
    whose = _whose(rows[0])
    return Event(
        at=rows[0].created_at,
        kind=event,
        subject=str(rows[0].pk),
        text=f"{AUDIT_TEXTS[event]}{f' ({whose})' if whose else ''}{times}",
        is_bad=event == "login_failed",
        link=link(rows[0], "audit"),
    )


def _whose(row: AuditEvent) -> str:
    """Where or what it was, in a few words."""
    details = row.details
    if row.event == "login_failed":
        name = f"{details.get('username') or 'an unknown name'}"
        return f"{name}, from {details.get('address') or 'an unknown address'}"
    return str(details.get("tinker_path") or details.get("prefix") or "")
