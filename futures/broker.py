"""django-q2's ORM broker, woken by LISTEN instead of polling, and our doorbell tasks in it.

An engine queue carries doorbells only: tasks that say "look at the futures". If the
acknowledgement of one is lost, the worker looks at an empty table once, so claims and
acknowledgements do not wait for the disk (that alone gives three to five times more tasks per
second, measured).
"""

from __future__ import annotations

import threading
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models.functions import Now
from django_q.brokers.orm import ORM
from django_q.conf import Conf
from django_q.tasks import async_task

from futures.database import alias, execute
from futures.models import Worker
from futures.notify import Bell, Listener, bell_channel, notify_bell

# Neither commit waits for the disk.
_CLAIM = """
WITH quick AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE django_q_ormq SET lock = statement_timestamp() + make_interval(secs => %(retry)s)
FROM quick
WHERE id = ANY (ARRAY(
    SELECT id FROM django_q_ormq
    WHERE key = %(queue)s AND lock <= statement_timestamp()
    ORDER BY id LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
))
RETURNING id, payload
"""

_DELETE = """
WITH quick AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
DELETE FROM django_q_ormq USING quick WHERE id = %(id)s
"""

_listeners = threading.local()
"""Queue to Listener, because each thread has its own connection."""

_epochs: dict[str, int] = {}
"""Queue to the epoch of this process's worker."""


class PostgresBroker(ORM):  # type: ignore[misc]  # django-q2 has no annotations
    """Tasks in order of arrival; each is claimed by one cluster at a time."""

    def enqueue(self, task: str) -> int:
        """Insert a task; clusters are woken once the outermost transaction has committed."""
        with transaction.atomic(using=alias()):
            row = self.get_connection().create(key=self.list_key, payload=task, lock=Now())
            notify_bell(self.list_key)
        return int(row.pk)

    def dequeue(self) -> list[tuple[int, str]]:
        """Claim tasks, waiting up to ``poll`` seconds for the first."""
        tasks = self.claim()
        if not tasks and self.wait(Conf.POLL):
            tasks = self.claim()
        return tasks

    def claim(self) -> list[tuple[int, str]]:
        """Claim up to ``bulk`` tasks, oldest first; each stays invisible for ``retry`` seconds."""
        rows = execute(_CLAIM, {"queue": self.list_key, "retry": Conf.RETRY, "limit": Conf.BULK})
        return sorted((int(task_id), str(payload)) for task_id, payload in rows)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for the queue's notification; True if it arrived or if that is unknown."""
        return bool(_listener(self.list_key).wait(timeout_seconds))

    def delete(self, task_id: int) -> None:
        execute(_DELETE, {"id": task_id})


def doorbells_unlock(queue: str) -> None:
    """Let every doorbell of an engine queue be claimed now.

    A task is visible from a wall-clock time on. If the clock is set back, an earlier task
    would be invisible until the clock catches up. It does no harm if a consumer finds a task that
    is already being answered: it looks at the futures once more.
    """
    execute(
        """
        UPDATE django_q_ormq SET lock = statement_timestamp()
        WHERE key = %(queue)s AND lock > statement_timestamp()
        """,
        {"queue": queue},
    )


def bell_rang(queue: str, timeout_seconds: float = 0.0) -> Bell:
    """The notifications on the queue since this thread last asked, or within the timeout.

    This takes the notification, so a caller that is told RANG must claim. Without a timeout it
    only looks at the socket once.
    """
    return _listener(queue).wait(timeout_seconds)


def listen_as(worker: Worker) -> None:
    """Leave out the notifications that are for other workers of its queue, in all threads."""
    _epochs[worker.queue] = worker.pk
    _listeners.__dict__.pop(worker.queue, None)


def doorbell(queue: str) -> str:
    """A signed django-q task that wakes ``queue``, made by django-q but not enqueued."""
    package = _Package()
    async_task(settings.FUTURES_TASK, queue, cluster=queue, broker=package)
    return package.task


class _Package:
    """Takes the broker's place in async_task, and keeps the task instead of enqueueing it."""

    task: str
    list_key = "doorbell"

    def enqueue(self, task: str) -> str:
        self.task = task
        return "with its future"


def _listener(queue: str) -> Listener:
    listeners: dict[str, Any] = _listeners.__dict__
    if queue not in listeners:
        listeners[queue] = Listener(bell_channel(queue), epoch=_epochs.get(queue))
    listener: Listener = listeners[queue]
    return listener
