"""Waiting without polling: one LISTEN connection per web process wakes all waiters.

A waiter registers before it reads the row, so a future that becomes final between the two
wakes it. Whenever LISTEN begins, at first or after a lost connection, all waiters are woken and
read again, because notifications may have been missed. A waiter needs a dictionary entry and no
database connection. The module serves the event loop of its process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar
from weakref import WeakKeyDictionary

import psycopg
from django.db import InterfaceError, OperationalError
from django.utils import timezone
from psycopg import sql

from futures.batched_reads import FutureReader
from futures.database import dedicated_parameters
from futures.errors import FutureNotFound
from futures.models import Future
from futures.notify import FINISHED_CHANNEL, PROGRESS_CHANNEL

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RECONNECT_SECONDS = 1.0

LONGEST_DELAY = timedelta(seconds=0.5)
"""Longer than any batching delay of a worker."""


class Waiters:
    """Wakes the waiters of one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._following: dict[str, set[asyncio.Queue[str | None]]] = {}
        self._listening: asyncio.Task[None] | None = None
        self.reader = FutureReader()

    @contextmanager
    def waiting(self, name: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever this future, or one of this unordered lane, may have
        become final."""
        self._begin_to_listen()
        event = asyncio.Event()
        self._waiting.setdefault(name, set()).add(event)
        try:
            yield event
        finally:
            events = self._waiting[name]
            events.discard(event)
            if not events:
                del self._waiting[name]

    @contextmanager
    def following(self, request_id: str) -> Iterator[asyncio.Queue[str | None]]:
        """A queue of the notes about a future that arrive from now on; None is never a note."""
        self._begin_to_listen()
        notes: asyncio.Queue[str | None] = asyncio.Queue()
        self._following.setdefault(request_id, set()).add(notes)
        try:
            yield notes
        finally:
            followers = self._following[request_id]
            followers.discard(notes)
            if not followers:
                del self._following[request_id]

    def _begin_to_listen(self) -> None:
        if self._listening is None or self._listening.done():
            self._listening = asyncio.create_task(self._listen(), name="futures waiters")
            self._listening.add_done_callback(self._forget)

    def _forget(self, listening: asyncio.Task[None]) -> None:
        """Drop a task that ended: it refers to its loop, and the loop refers to us."""
        if self._listening is listening:
            self._listening = None

    async def close(self) -> None:
        """Stop listening and reading; the next waiter starts again."""
        await self.reader.close()
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
            self._listening = None

    async def _listen(self) -> None:
        lost = False
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(
                    **dedicated_parameters()
                ) as connection:
                    for channel in (PROGRESS_CHANNEL, FINISHED_CHANNEL):
                        await connection.execute(
                            sql.SQL("LISTEN {}").format(sql.Identifier(channel))
                        )
                    lost = False
                    self._wake(list(self._waiting))
                    async for notification in connection.notifies():
                        if notification.channel == PROGRESS_CHANNEL:
                            self._tell(notification.payload)
                        else:
                            self._wake(notification.payload.split())
            except psycopg.Error as error:
                if not lost:  # once for each outage
                    logger.warning("Postgres does not answer; trying again (%s)", error)
                lost = True
            await asyncio.sleep(_RECONNECT_SECONDS)

    def _wake(self, names: list[str]) -> None:
        for name in names:
            for event in self._waiting.get(name, ()):
                event.set()

    def _tell(self, payload: str) -> None:
        request_id, _, note = payload.partition(" ")
        for notes in self._following.get(request_id, ()):
            notes.put_nowait(note)


_of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, Waiters] = WeakKeyDictionary()


def waiters() -> Waiters:
    """The waiters of the running event loop."""
    return _of_loops.setdefault(asyncio.get_running_loop(), Waiters())


async def future_wait(
    request_id: str,
    *,
    owner_id: int,
    timeout_seconds: float,
    is_known: bool = False,
    is_hopeless: Callable[[Future], bool] = lambda future: False,
) -> Future | None:
    """The future with its result once it is final, or None when the time is up.

    Args:
        is_known: The caller has just submitted it. If Postgres goes down, this then waits for it
            even before the first read: the request was accepted, and must not look refused.
        is_hopeless: Called with a future that is not final: True if waiting is useless, and
            the answer is None at once.

    Raises:
        FutureNotFound: The owner has no such future. (404)
        OperationalError: Django's; Postgres could not be asked even once.
    """
    reader = waiters().reader
    is_first = True

    async def read() -> Future | None:
        nonlocal is_first
        future = await reader.read(request_id)
        if future is None or future.owner_id != owner_id:
            raise FutureNotFound.named(request_id)
        if future.is_final or is_hopeless(future):
            return future
        if is_first and timeout_seconds > 0 and _may_be_held_back(future):
            reader.flush(future.queue)
        is_first = False
        return None

    found = await read_when_woken(
        request_id, read, timeout_seconds=timeout_seconds, must_ask=not is_known
    )
    return found if found is not None and found.is_final else None


def _may_be_held_back(future: Future) -> bool:
    """Whether its worker may be delaying it for batch-mates, which takes a moment only."""
    return future.delayable and timezone.now() - future.created_at < LONGEST_DELAY


async def future_progress(
    request_id: str, *, owner_id: int, timeout_seconds: float
) -> AsyncGenerator[str, None]:
    """The worker's notes about a future, until it is final or the time is up.

    Notes come in order. Some may be lost, and earlier ones are not repeated; ``future_wait``
    then has the complete result.

    Raises:
        FutureNotFound: The owner has no such future. (404)
        OperationalError: Django's; Postgres could not be asked.
    """
    with waiters().following(request_id) as notes:
        # Read first, so that nobody gets notes of another owner's future.
        if await future_wait(request_id, owner_id=owner_id, timeout_seconds=0) is not None:
            return
        waiting = asyncio.create_task(
            future_wait(request_id, owner_id=owner_id, timeout_seconds=timeout_seconds)
        )
        waiting.add_done_callback(lambda _: notes.put_nowait(None))
        try:
            while (note := await notes.get()) is not None:
                yield note
            waiting.result()  # raises what it raised
        finally:
            waiting.cancel()


async def read_when_woken(
    name: str,
    read: Callable[[], Awaitable[T | None]],
    *,
    timeout_seconds: float,
    must_ask: bool = True,
) -> T | None:
    """The result of ``read`` once it is not None, or None when the time is up.

    Holds no connection and no transaction while it waits, so giving up is free and waiting
    twice is harmless. If Postgres goes away meanwhile, it waits for it to come back.

    Args:
        name: A request id, or an unordered lane's id, which is woken with each of its futures.
        read: Reads the database.
        must_ask: Raise if the first read fails.

    Raises:
        OperationalError: Django's; Postgres could not be asked even once, and ``must_ask``.
        Exception: What ``read`` raises.
    """
    if timeout_seconds <= 0:
        return await read()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_seconds
    asked = not must_ask
    with waiters().waiting(name) as event:
        while True:
            event.clear()
            over = loop.time() >= deadline
            try:
                found = await read()
                asked = True
            except (OperationalError, InterfaceError):
                if not asked:
                    raise
                found = None
                # The notification that woke us may have been the last one.
                event.set()
                await asyncio.sleep(min(_RECONNECT_SECONDS, max(0.0, deadline - loop.time())))
            if found is not None:
                return found
            if over:
                return None
            # When the time is up the rows are read once more, in case a notification was lost.
            try:
                async with asyncio.timeout_at(deadline):
                    await event.wait()
            except TimeoutError:
                continue
