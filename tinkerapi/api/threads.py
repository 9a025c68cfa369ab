"""The threads in which requests use the database: four for most, two for large bodies, and some for
what waits for a remote storage.

Each thread keeps its own connection. Decoding a large body occupies a thread for longer than small
requests can wait, so large bodies have their own threads. A user has one of them at
a time, so other users do not wait behind one user's large bodies.
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
"""One decodes while the other writes to the database; each may take some hundred megabytes."""

STORAGE_THREADS = 8
"""They wait for a bucket, and for nothing else."""

executor = ThreadPoolExecutor(DATABASE_THREADS, thread_name_prefix="database")
bulk_executor = ThreadPoolExecutor(BULK_THREADS, thread_name_prefix="bulk")

storage_executor = ThreadPoolExecutor(STORAGE_THREADS, thread_name_prefix="storage")

_turns: WeakValueDictionary[tuple[int, int, object], asyncio.Lock] = WeakValueDictionary()
"""By event loop, threads and owner; a turn exists as long as a request has it or waits for it."""


def with_connection(function: Callable[..., T], *args: Any) -> T:
    """Call it on this thread's connection, and leave the connection usable."""
    raw = connection.connection
    if raw is not None and is_lost(raw):
        connection.close()
    try:
        answer = function(*args)
    except DatabaseFailure:
        connection.close()  # it may be the cause
        raise
    if connection.connection is not None:
        circuit_breaker.is_over()
    return answer


async def in_database_thread(function: Callable[..., T], *args: Any) -> T:
    """Run a function that uses the database."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(executor, with_connection, function, *args)


async def in_bulk_thread(owner: object, function: Callable[..., T], *args: Any) -> T:
    """Run a function that may take long, after the same owner's previous one.

    If the caller is cancelled, the function is not begun. A function that has begun ends, and the
    owner's next one waits for that.
    """
    return await _in_turn(bulk_executor, owner, function, *args)


async def in_storage_thread(owner: object, function: Callable[..., T], *args: Any) -> T:
    """Run a function that uses a remote storage, as ``in_bulk_thread`` does."""
    return await _in_turn(storage_executor, owner, function, *args)


async def _in_turn(
    threads: ThreadPoolExecutor, owner: object, function: Callable[..., T], *args: Any
) -> T:
    loop = asyncio.get_running_loop()
    key = (id(loop), id(threads), owner)
    turn = _turns.get(key) or _turns.setdefault(key, asyncio.Lock())
    await turn.acquire()
    work = threads.submit(with_connection, function, *args)

    def over(_: object) -> None:
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(turn.release)

    work.add_done_callback(over)
    return await asyncio.wrap_future(work)
