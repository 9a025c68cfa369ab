"""Large bodies have threads of their own, and users take turns in them."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.waiting import LONG_SECONDS, wait_for
from tinkerapi.api import async_view, authentication, threads
from tinkerapi.api.bodies.limit import SMALL_BODY_BYTES
from tinkerapi.api.threads import BULK_THREADS, in_bulk_thread, in_database_thread


class Jobs:
    """Work that continues until it is released, and the order in which it began."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.gates: dict[str, threading.Event] = {}

    def job(self, name: str) -> Callable[[], str]:
        gate = self.gates.setdefault(name, threading.Event())

        def run() -> str:
            self.begun.append(name)
            assert gate.wait(LONG_SECONDS)
            return name

        return run

    async def until_begun(self, *names: str) -> None:
        while not set(names) <= set(self.begun):
            await asyncio.sleep(0.005)


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    made = Jobs()
    yield made
    for gate in made.gates.values():
        gate.set()


def test_a_user_has_one_turn_at_a_time_and_another_user_the_next(jobs: Jobs) -> None:
    async def run() -> list[str]:
        work = [
            asyncio.ensure_future(in_bulk_thread(name[0], jobs.job(name)))
            for name in ("a1", "a2", "a3", "b1")
        ]
        await jobs.until_begun("a1", "b1")
        assert set(jobs.begun) == {"a1", "b1"}  # in two threads at once
        for name in ("a1", "a2", "a3", "b1"):
            jobs.gates[name].set()
        return await asyncio.gather(*work)

    assert asyncio.run(asyncio.wait_for(run(), LONG_SECONDS)) == ["a1", "a2", "a3", "b1"]
    assert jobs.begun[2:] == ["a2", "a3"]


def test_a_client_that_leaves_keeps_its_turn_until_its_work_is_over(jobs: Jobs) -> None:
    """Else many that leave at once would have all threads."""

    async def run() -> None:
        first = asyncio.ensure_future(in_bulk_thread("a", jobs.job("a1")))
        await jobs.until_begun("a1")
        first.cancel()
        with suppress(asyncio.CancelledError):
            await first
        second = asyncio.ensure_future(in_bulk_thread("a", jobs.job("a2")))
        await asyncio.sleep(0.05)
        assert jobs.begun == ["a1"]
        jobs.gates["a1"].set()
        await jobs.until_begun("a2")
        jobs.gates["a2"].set()
        assert await second == "a2"

    asyncio.run(asyncio.wait_for(run(), LONG_SECONDS))
    # Its thread drops the finished work a moment after it has reported it.
    wait_for(lambda: gc.collect() >= 0 and not threads._turns)


def test_small_work_does_not_wait_for_large(jobs: Jobs) -> None:
    async def run() -> None:
        names = [f"{owner}" for owner in range(BULK_THREADS)]
        work = [asyncio.ensure_future(in_bulk_thread(name, jobs.job(name))) for name in names]
        await jobs.until_begun(*names)
        assert await in_database_thread(lambda: "small") == "small"
        for name in names:
            jobs.gates[name].set()
        await asyncio.gather(*work)

    asyncio.run(asyncio.wait_for(run(), LONG_SECONDS))


def test_a_large_body_is_decoded_where_large_ones_are(transactional_db, monkeypatch) -> None:
    from tests.api.test_asgi import call

    seen: list[str] = []
    begin = async_view.AsyncAPIView._run_handler

    def noting(self, request):
        seen.append(threading.current_thread().name.partition("_")[0])
        return begin(self, request)

    monkeypatch.setattr(async_view.AsyncAPIView, "_run_handler", noting)
    for size in (10, async_view.BULK_BYTES + 1):
        body = b'{"data": "%s"}' % (b"x" * size)
        for length in ({"content-length": str(len(body))}, {"transfer-encoding": "chunked"}):
            assert call("/fwdbwd", headers=length, body=[body, b""])[0] == 400

    assert seen == ["database", "database", "bulk", "bulk"]


@pytest.mark.parametrize(
    ("size", "visited"),
    [
        (10, ["database"]),
        (SMALL_BODY_BYTES + 1, ["database", "database"]),  # the first, before the body may come
        (async_view.BULK_BYTES + 1, ["database", "bulk"]),
    ],
)
@pytest.mark.parametrize("length", [True, False])
def test_a_request_visits_a_thread_once_and_once_more_if_its_body_must_be_admitted(
    transactional_db: None,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    visited: list[str],
    length: bool,
) -> None:
    from tests.api.test_asgi import call

    visits: list[str] = []
    asked: list[str] = []
    visit, ask = threads.with_connection, authentication.user_by_name

    def noting_visit(function: Any, *args: Any) -> Any:
        visits.append(threading.current_thread().name.partition("_")[0])
        return visit(function, *args)

    def noting_question(name: str) -> Any:
        asked.append(name)
        return ask(name)

    monkeypatch.setattr(threads, "with_connection", noting_visit)
    monkeypatch.setattr(authentication, "user_by_name", noting_question)
    body = b'{"data": "%s"}' % (b"x" * size)
    known = {"content-length": str(len(body))} if length else {"transfer-encoding": "chunked"}

    assert call("/fwdbwd", headers=known, body=[body, b""])[0] == 400

    assert visits == (visited if length or len(visited) == 2 else ["database", *visited])
    assert asked == ["local"]
