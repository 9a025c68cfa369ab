"""What is wrong with the server, as sentences for the dashboard's banner."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from django.conf import settings
from django.template.defaultfilters import filesizeformat
from django.urls import reverse
from django.utils import timezone

from futures.models import Worker
from tinkerapi.console.kit.display import changelist_url, moment_text, page_url
from tinkerapi.deliveries import last_failure
from tinkerapi.models import Delivery
from tinkerapi.server.disk_history import disk_history, full_in
from tinkerapi.server.last_backup import last_backup_at
from training.base_models import base_models
from training.server_figures import worker_state

DISK_WARNING, DISK_ALARM = 0.10, 0.03
"""Shares of the disk that are free."""
DISK_FORECAST = timedelta(days=3)
"""A disk that will be full sooner is a warning."""
BACKUP_AGE = timedelta(days=7)
"""Only a server that was backed up once is expected to be backed up again."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One line of the banner."""

    is_alarm: bool
    """Requests do not run, or soon will not; else a warning."""
    kind: str
    """What is wrong, as one word."""
    subject: str = ""
    """Of what; ``kind`` and ``subject`` together name the problem."""
    text: str
    url: str


def problems(workers: Sequence[Worker], *, for_operator: bool) -> list[Problem]:
    """The alarms, then the warnings.

    Args:
        workers: What ``futures.overview.workers_of`` returns for the served base models.
        for_operator: Also what only the operator can change.
    """
    found = [*_of_workers(workers), *_of_disk()]
    if for_operator:
        found += [*_of_backup(), *_of_webhook()]
    return sorted(found, key=lambda problem: not problem.is_alarm)


def _of_workers(workers: Sequence[Worker]) -> list[Problem]:
    found = []
    for model in base_models():
        own = [worker for worker in workers if worker.queue == model.queue]
        states = {worker_state(worker) for worker in own}
        newest = max(own, key=lambda worker: worker.pk, default=None)
        url = changelist_url(Worker) if newest is None else page_url(newest)
        for worker in own:
            if worker_state(worker) == "silent":
                heard = moment_text(worker.heartbeat_at)
                text = f"{model.name}: worker #{worker.pk} does not answer; last heard of {heard}."
                is_only = "live" not in states
                found.append(
                    Problem(
                        is_alarm=is_only,
                        kind="worker_silent",
                        subject=str(worker.pk),
                        text=text,
                        url=page_url(worker),
                    )
                )
        if states & {"live", "silent"}:
            continue
        if "starting" in states and newest is not None:
            since = moment_text(newest.started_at)
            text = f"{model.name}: the worker is starting (since {since}); requests wait for it."
            kind = "worker_starting"
            found.append(Problem(is_alarm=False, kind=kind, subject=model.name, text=text, url=url))
        elif newest is None:
            text = f"{model.name}: no worker has served it yet; requests wait."
            found.append(_missing(model.name, text, url))
        else:
            how = "was lost" if newest.state == Worker.WorkerState.LOST else "stopped"
            when = moment_text(newest.stopped_at or newest.heartbeat_at)
            text = (
                f"{model.name}: the worker {how} {when}, and no other has started; requests wait."
            )
            found.append(_missing(model.name, text, url))
    return found


def _missing(base_model: str, text: str, url: str) -> Problem:
    kind = "worker_missing"
    return Problem(is_alarm=True, kind=kind, subject=base_model, text=text, url=url)


def disk_full_in(free_bytes: int) -> timedelta | None:
    """The time until the data folder's disk is full, if the last days tell."""
    notes = disk_history(settings.DATA_DIR)
    return full_in(notes, free_bytes=free_bytes, now=time.time())


def _of_disk() -> list[Problem]:
    url = reverse("docs-page", args=["operations"]) + "#faults"
    try:
        disk = shutil.disk_usage(settings.DATA_DIR)
    except OSError as error:
        text = f"The data folder cannot be read: {error.strerror}."
        return [Problem(is_alarm=True, kind="disk_unreadable", text=text, url=url)]
    share = disk.free / disk.total if disk.total else 1.0
    if share >= DISK_WARNING:
        left = disk_full_in(disk.free)
        if left is None or left > DISK_FORECAST:
            return []
        hours = f"{left / timedelta(hours=1):.0f} hours"
        text = f"At the growth of the last days the disk of the data folder is full in {hours}."
        return [Problem(is_alarm=False, kind="disk_filling", text=text, url=url)]
    text = (
        f"The disk of the data folder is nearly full: {filesizeformat(disk.free)} of "
        f"{filesizeformat(disk.total)} are free."
    )
    return [Problem(is_alarm=share < DISK_ALARM, kind="disk_low", text=text, url=url)]


def _of_webhook() -> list[Problem]:
    """A receiver that does not take events."""
    if settings.WEBHOOK is None:
        return []
    last = last_failure()
    if last is None:
        return []
    text = (
        f"The webhook's receiver {settings.WEBHOOK.host} did not take the last event, "
        f"{moment_text(last.tried_at or last.created_at)}: {last.last_error}."
    )
    return [Problem(is_alarm=False, kind="webhook", text=text, url=changelist_url(Delivery))]


def _of_backup() -> list[Problem]:
    made_at = last_backup_at()
    if made_at is None or timezone.now() - made_at <= BACKUP_AGE:
        return []
    text = f"The last backup was made {moment_text(made_at)}."
    url = reverse("docs-page", args=["operations"]) + "#backup"
    return [Problem(is_alarm=False, kind="backup_old", text=text, url=url)]
