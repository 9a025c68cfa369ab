"""Reads of futures by id for the tasks of an event loop, over a connection of its own.

Ids that are requested while a statement runs share the next statement. A commit that wakes five
hundred waiters is therefore followed by eight statements instead of five hundred, and a waiter that
reads needs no thread and no connection.
"""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
from django.db import OperationalError

from futures.database import alias, dedicated_parameters, is_lost
from futures.models import Future
from futures.notify import FLUSH_NOTE, bell_channel

MAX_IDS = 64
"""Ids in one statement; a result may have megabytes."""

Asked = dict[str, "asyncio.Future[Future | psycopg.Error | None]"]
"""Request id to the future that its readers await."""

_COLUMNS = tuple(
    column.attname for column in Future._meta.concrete_fields if column.attname != "payload"
)
_READ = f"SELECT {', '.join(_COLUMNS)} FROM futures_future WHERE id = ANY (%s)"  # noqa: S608
_ID = _COLUMNS.index("id")


class FutureReader:
    """Reads for the tasks of one event loop."""

    def __init__(self) -> None:
        self._asked: Asked = {}
        self._some_asked = asyncio.Event()
        self._flushed: set[str] = set()
        self._reading: asyncio.Task[None] | None = None

    async def read(self, request_id: str) -> Future | None:
        """The future's current state, without its payload; None if it does not exist.

        Raises:
            OperationalError: Django's; Postgres is down.
        """
        self._begin()
        asked = self._asked.get(request_id)
        if asked is None:
            asked = self._asked[request_id] = asyncio.get_running_loop().create_future()
            self._some_asked.set()
        found = await asyncio.shield(asked)  # other readers may await it too
        if isinstance(found, psycopg.Error):
            raise OperationalError(str(found)) from found
        return found

    def flush(self, queue: str) -> None:
        """Tell the queue's worker that a client waits; only a hint, which may be lost."""
        self._begin()
        self._flushed.add(queue)
        self._some_asked.set()

    def _begin(self) -> None:
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read(), name="futures reader")
            self._reading.add_done_callback(self._forget)

    async def close(self) -> None:
        """Stop reading; the next read starts again."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    def _forget(self, reading: asyncio.Task[None]) -> None:
        """Drop a task that ended: it refers to its loop, and the loop refers to us."""
        if self._reading is reading:
            self._reading = None

    async def _read(self) -> None:
        connection: psycopg.AsyncConnection[Any] | None = None
        asked: Asked = {}
        try:
            while True:
                await self._some_asked.wait()
                asked, flushed = self._take()
                try:
                    if connection is not None and is_lost(connection):
                        await connection.close()
                    if connection is None or connection.closed:
                        connection = await psycopg.AsyncConnection.connect(**dedicated_parameters())
                    if asked:
                        found = await futures_by_id(connection, list(asked))
                        for request_id, waiting in asked.items():
                            waiting.set_result(found.get(request_id))
                    for queue in flushed:
                        await connection.execute(
                            "SELECT pg_notify(%s, %s)", (bell_channel(queue), FLUSH_NOTE)
                        )
                except psycopg.Error as error:
                    _fail(asked, error)
                    if connection is not None:
                        await connection.close()
        finally:
            # However this task ends, nobody may wait for it indefinitely.
            _fail(asked | self._asked, psycopg.OperationalError("the reader ended"))
            self._asked.clear()
            if connection is not None:
                await connection.close()

    def _take(self) -> tuple[Asked, set[str]]:
        """The first of the requested ids, and the queues whose batches are to be flushed.

        A later request for one of these ids waits for the next read.
        """
        taken = {name: self._asked.pop(name) for name in list(self._asked)[:MAX_IDS]}
        flushed, self._flushed = self._flushed, set()
        if not self._asked:
            self._some_asked.clear()
        return taken, flushed


def _fail(asked: Asked, error: psycopg.Error) -> None:
    """Raise the error in all readers that have no answer yet."""
    for waiting in asked.values():
        if not waiting.done():
            waiting.set_result(error)


async def futures_by_id(
    connection: psycopg.AsyncConnection[Any], request_ids: list[str]
) -> dict[str, Future]:
    """The existing ones of these futures, without their payloads."""
    rows = await (await connection.execute(_READ, (request_ids,), binary=True)).fetchall()
    return {row[_ID]: Future.from_db(alias(), _COLUMNS, row) for row in rows}
