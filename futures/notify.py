"""LISTEN and NOTIFY: hints that something changed. A lost one costs time, never a future.

Three channels: one for each queue says that a request was submitted, one says which futures are
final, and one tells followers the progress of a future. NOTIFY takes a server-wide
lock until its transaction has been flushed, so submitters send theirs after their commit, as a
separate statement (three to five times more commits per second, measured); workers, which are few
and commit whole batches, may send it inside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from enum import IntFlag
from weakref import ref

import psycopg
from django.db import connections, transaction
from psycopg import sql

from futures.database import alias, execute, psycopg_connection

FINISHED_CHANNEL = "futures_finished"
"""Payload: request ids separated by spaces, or the id of an unordered lane."""

PROGRESS_CHANNEL = "futures_progress"
"""Payload: a request id, a space, and the worker's note."""

MAX_NOTE_BYTES = 7900  # together with the id; Postgres allows 8000 bytes

_IDS_PER_NOTIFICATION = 150  # of 39 characters each; Postgres allows 8000 bytes

TELL_FINISHED = f"""
, note (payload) AS (
    SELECT string_agg(id, ' ') FROM (
        SELECT id, (row_number() OVER () - 1) / {_IDS_PER_NOTIFICATION} AS pack FROM finished
    ) AS packed GROUP BY pack
    UNION ALL
    SELECT DISTINCT l.id FROM finished JOIN futures_lane AS l ON l.id = finished.lane_id
    WHERE NOT l.ordered
), told AS MATERIALIZED (
    SELECT pg_notify('{FINISHED_CHANNEL}', payload) FROM note
)
SELECT id, (SELECT count(*) FROM told) FROM finished
"""  # noqa: S608
"""The end of a statement ``WITH finished AS (...)``, which has ids and lanes of futures: their
waiters are woken when the transaction commits, and the ids are its rows."""


def bell_channel(queue: str) -> str:
    """The channel of a queue; hashed, because a channel name may have 63 bytes at most."""
    return f"futures_bell_{hashlib.sha256(queue.encode()).hexdigest()[:32]}"


def notify_bell(queue: str, *, delayable: bool = False, epoch: int | None = None) -> None:
    """Wake the queue's workers once the outermost transaction has committed.

    If that fails, the commit stays valid, and the workers find the future at their next poll.

    Args:
        delayable: The submitted request may wait for batch-mates.
        epoch: The worker to which the request's lane is leased; the others need not look. None: any
            may run it.
    """
    note = DELAYABLE_NOTE if delayable else ""
    if epoch is not None:
        note = f"{note} {epoch}"

    def ring() -> None:  # not a partial: Django asks for the name of a failed function
        execute(
            "SELECT pg_notify(%(channel)s, %(note)s)",
            {"channel": bell_channel(queue), "note": note},
        )

    transaction.on_commit(ring, using=alias(), robust=True)


def notify_finished(request_ids: Iterable[str]) -> None:
    """Wake the waiters of these futures, and of the unordered lanes that they are in, when the
    current transaction commits."""
    ids = list(request_ids)
    if ids:
        execute(
            f"""
            WITH finished AS (
                SELECT given.id, f.lane_id
                FROM unnest(%(ids)s::text[]) AS given (id)
                LEFT JOIN futures_future AS f ON f.id = given.id AND f.id = ANY (%(ids)s::text[])
            ) {TELL_FINISHED}
            """,  # noqa: S608
            {"ids": ids},
        )


def notify_progress(notes: Iterable[tuple[str, str]]) -> None:
    """Send notes to the followers of these futures, in a separate statement outside a transaction.

    Notes are not kept: anything that a follower must not miss belongs in the result.

    Args:
        notes: Request id and note, each of at most MAX_NOTE_BYTES together, in UTF-8 without
            the character U+0000.
    """
    execute(
        "SELECT pg_notify(%(channel)s, note) FROM unnest(%(notes)s::text[]) AS note",
        {
            "channel": PROGRESS_CHANNEL,
            "notes": [f"{request_id} {note}" for request_id, note in notes],
        },
    )


def notify_finished_after_commit(request_ids: Iterable[str]) -> None:
    """As ``notify_finished``, but after the outermost transaction; for submitters."""
    ids = list(request_ids)
    transaction.on_commit(lambda: notify_finished(ids), using=alias(), robust=True)


def notify_cancelled_after_commit(request_id: str, *, queue: str) -> None:
    """Wake this future's waiters, and tell the queue's worker to drop it."""

    def tell() -> None:
        notify_finished([request_id])
        execute(
            "SELECT pg_notify(%(channel)s, %(note)s)",
            {"channel": bell_channel(queue), "note": CANCELLED_NOTE},
        )

    transaction.on_commit(tell, using=alias(), robust=True)


class Bell(IntFlag):
    """The notifications on a queue; no notification is false."""

    SILENT = 0
    RANG = 1
    """Something was submitted that any worker may run."""
    FLUSH = 2
    """A client has begun to wait for a request that was just submitted."""
    CANCELLED = 4
    """Something that a worker held was cancelled."""
    DELAYABLE = 8
    """A request was submitted that may wait for batch-mates, and that any worker may run."""
    RANG_OWN = 16
    """Something was submitted to a lane that is leased to this worker."""
    DELAYABLE_OWN = 32
    """The same for a request that may wait for batch-mates."""
    UNDELAYED = RANG | RANG_OWN
    DELAYED = DELAYABLE | DELAYABLE_OWN
    ANYWHERE = RANG | DELAYABLE
    SUBMITTED = UNDELAYED | DELAYED


FLUSH_NOTE = "flush"
CANCELLED_NOTE = "cancelled"
DELAYABLE_NOTE = "delayable"

_HEARD = {
    FLUSH_NOTE: Bell.FLUSH,
    CANCELLED_NOTE: Bell.CANCELLED,
    DELAYABLE_NOTE: Bell.DELAYABLE,
}
_HEARD_OWN = {"": Bell.RANG_OWN, DELAYABLE_NOTE: Bell.DELAYABLE_OWN}


def _heard(note: str, epoch: int | None) -> Bell:
    """The meaning of a notification for the worker of an epoch."""
    word, is_addressed, addressee = note.partition(" ")
    if not is_addressed:
        return _HEARD.get(word, Bell.RANG)
    return _HEARD_OWN[word] if addressee == str(epoch) else Bell.SILENT


class Listener:
    """LISTEN on this thread's Django connection, repeated after each reconnect.

    psycopg keeps notifications that arrive during other statements, so none is missed while
    the connection lives; after a reconnect ``wait`` once returns RANG and CANCELLED,
    because any notification may have been missed. Not for use inside a transaction.
    """

    def __init__(self, channel: str, *, epoch: int | None = None) -> None:
        """``epoch``: of the worker that listens; notifications for others are left out."""
        self._channel = channel
        self._epoch = epoch
        self._listening: ref[psycopg.Connection[object]] | None = None

    def wait(self, timeout_seconds: float) -> Bell:
        """Wait for a notification and take all that have arrived; SILENT when time is up.

        With zero seconds it only checks.

        Raises:
            OperationalError: Django's; the connection is lost.
        """
        with connections[alias()].wrap_database_errors:
            connection = psycopg_connection()
            if self._listening is None or self._listening() is not connection:
                connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self._channel)))
                self._listening = ref(connection)
                return Bell.RANG | Bell.CANCELLED
            # One at a time: the generator must be exhausted before the connection is used again.
            arrived = list(connection.notifies(timeout=timeout_seconds, stop_after=1))
            arrived += connection.notifies(timeout=0)
        heard = Bell.SILENT
        for notification in arrived:
            heard |= _heard(notification.payload, self._epoch)
        return heard
