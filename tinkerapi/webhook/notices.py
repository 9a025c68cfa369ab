"""What there is to send: the dashboard's events, and the begin and end of its problems.

Events are read from rows that exist for other purposes, those of the last minutes again and again:
a row may become visible later than one that was written after it. A notice's key makes a repeat
harmless.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from django.utils import timezone

from futures.overview import worker_lives_newest, workers_of
from tinkerapi.console.server_events import (
    AUDIT_TEXTS,
    Event,
    audit_event,
    backup_event,
    worker_events,
)
from tinkerapi.console.server_problems import Problem, problems
from tinkerapi.deliveries import MAX_SUBJECT, Notice, Status, newest_of, open_subjects
from tinkerapi.server.last_backup import last_backup_at
from training.audit import audit_of
from training.base_models import base_models

LOOK_BACK = timedelta(minutes=10)
"""How far back events are looked for."""
FIRST_LOOK_BACK = timedelta(days=1)
"""The same at the first look, after a time in which nobody looked."""
MOST_LIVES = 100
MOST_AUDITED = 1000
"""Rows that are looked at, the newest."""
STEADY_SECONDS = 30.0
"""A problem begins, and is over, once it has been so for this long."""

PROBLEMS = (
    "worker_missing",
    "worker_silent",
    "disk_low",
    "disk_full",
    "disk_filling",
    "backup_old",
)


def event_notices(*, events: Collection[str], since: datetime) -> list[Notice]:
    """The chosen events since a moment, as notices."""
    found: list[Event] = []
    if {"worker_started", "worker_stopped", "worker_lost"} & set(events):
        found += worker_events(worker_lives_newest(limit=MOST_LIVES))
    if audited := [event for event in AUDIT_TEXTS if event in events]:
        for row in audit_of(audited, since=since, limit=MOST_AUDITED):
            found.append(_rare(audit_event(row.event, [row]), row.owner_id))
    if (made_at := last_backup_at()) is not None:
        found.append(backup_event(made_at))
    return [
        Notice(
            event=event.kind,
            subject=event.subject,
            status=Status.HAPPENED,
            text=event.text,
            at=event.at,
            key=f"{event.kind}:{event.subject}",
        )
        for event in found
        if event.kind in events and event.at >= since
    ]


def _rare(event: Event, owner_id: int | None) -> Event:
    """Failed logins of one user are one event in an hour: a stranger can cause any number."""
    if event.kind != "login_failed":
        return event
    return replace(event, subject=f"{owner_id or ''}:{event.at:%Y-%m-%dT%H}")


@dataclass
class ProblemWatch:
    """Turns the problems of now into notices of those that began and of those that are over."""

    events: Collection[str]
    clock: Callable[[], float] = time.monotonic
    _changes: dict[tuple[str, str], float] = field(default_factory=dict, init=False)
    """Kind and subject of each problem that differs from what was sent, to when that was seen."""

    def notices(self) -> list[Notice]:
        """The changes that have lasted; call it every few seconds."""
        # Cut as it is stored: a longer name would be another problem at each look.
        now = {(one.kind, one.subject[:MAX_SUBJECT]): one for one in self._problems()}
        begun = {
            (kind, subject)
            for kind in PROBLEMS
            if kind in self.events
            for subject in open_subjects(kind)
        }
        changed = now.keys() ^ begun
        self._changes = {key: self._changes.get(key, self.clock()) for key in changed}
        return [
            self._notice(*key, now.get(key))
            for key, since in self._changes.items()
            if self.clock() - since >= STEADY_SECONDS
        ]

    def _problems(self) -> Iterator[Problem]:
        workers = workers_of([model.queue for model in base_models()])
        for problem in problems(workers, for_operator=True):
            if problem.kind in self.events:
                yield problem
            if problem.kind == "disk_low" and problem.is_alarm and "disk_full" in self.events:
                yield replace(problem, kind="disk_full")

    def _notice(self, kind: str, subject: str, problem: Problem | None) -> Notice:
        last = newest_of(kind, subject)
        status = Status.BEGAN if problem is not None else Status.OVER
        before = last.text if last is not None else kind
        return Notice(
            event=kind,
            subject=subject,
            status=status,
            text=problem.text if problem is not None else f"Over: {before}",
            at=timezone.now(),
            key=f"{kind}:{subject}:{status} after {0 if last is None else last.pk}",
        )
