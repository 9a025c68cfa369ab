"""The threads in which requests use the database: a few for most, and two for large bodies.

Each thread keeps its own connection. To decode a large body takes a thing that small requests
cannot wait for, a thread, so large bodies have threads of their own; and a user has one of them at
a time, so that one user's queue of large bodies is not another's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from django.db import Error as DatabaseFailure
from django.db import connection

from futures.circuit_breaker import circuit_breaker
from futures.database import is_lost

T = TypeVar("T")

DATABASE_THREADS = 4
"""More would wait for Python's lock."""

BULK_THREADS = 2
"""One decodes while the other writes to the database; each may hold some hundred megabytes."""

executor = ThreadPoolExecutor(DATABASE_THREADS, thread_name_prefix="database")
bulk_executor = ThreadPoolExecutor(BULK_THREADS, thread_name_prefix="bulk")

_turns: WeakValueDictionary[tuple[int, object], asyncio.Lock] = WeakValueDictionary()
"""By event loop and owner; a turn lives as long as somebody has it or waits for it."""


def with_connection(function: Callable[..., T], *args: Any) -> T:
    """Call it on this thread's connection, and leave that one fit for the next call."""
    raw = connection.connection
    if raw is not None and is_lost(raw):
        connection.close()
    try:
        answer = function(*args)
    except DatabaseFailure:
        connection.close()  # it may be what failed
        raise
    if connection.connection is not None:
        circuit_breaker.is_over()
    return answer


async def in_database_thread(function: Callable[..., T], *args: Any) -> T:
    """Run a function that uses the database."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(executor, with_connection, function, *args)


async def in_bulk_thread(owner: object, function: Callable[..., T], *args: Any) -> T:
    """Run a function that may take long, after what the same owner has running here.

    If the caller is cancelled, the function is not begun; what has begun ends, and the owner's
    next one waits for that.
    """
    loop = asyncio.get_running_loop()
    key = (id(loop), owner)
    turn = _turns.get(key) or _turns.setdefault(key, asyncio.Lock())
    await turn.acquire()
    work = bulk_executor.submit(with_connection, function, *args)

    def over(_: object) -> None:
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(turn.release)

    work.add_done_callback(over)
    return await asyncio.wrap_future(work)
