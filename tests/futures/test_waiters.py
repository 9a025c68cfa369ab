"""Waiting in an event loop: woken by the commit, by a reconnect, and free to give up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import psycopg
import pytest
from django.db import OperationalError

from futures import waiters as hub_module
from futures.batched_reads import FutureReader
from futures.broker import bell_rang
from futures.cancelling import future_cancel
from futures.claiming import future_claim
from futures.database import dedicated_parameters
from futures.errors import FutureNotFound
from futures.models import Future, Worker
from futures.notify import Bell
from futures.waiters import future_wait, waiters
from tests.futures.conftest import QUEUE, SubmitFactory, finish, race
from tests.waiting import LONG_SECONDS

pytestmark = pytest.mark.django_db(transaction=True)

Result = TypeVar("Result")


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Run in a fresh loop, and let its waiters go."""

    async def inner() -> Result:
        try:
            return await asyncio.wait_for(main, LONG_SECONDS)
        finally:
            await waiters().close()

    return asyncio.run(inner())


async def in_thread(call: Callable[[], Any]) -> None:
    """Call in another thread, with a separate connection that is closed after."""
    [outcome] = await asyncio.get_running_loop().run_in_executor(None, race, call)
    assert not isinstance(outcome, Exception), outcome


async def listening() -> None:
    """Return once the waiters listen."""
    while not any("LISTEN" in query for query in await hub_queries()):
        await asyncio.sleep(0.01)


async def hub_queries() -> list[str]:
    async with await psycopg.AsyncConnection.connect(**dedicated_parameters()) as connection:
        rows = await connection.execute(
            "SELECT query FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid()"
        )
        return [query for (query,) in await rows.fetchall()]


async def terminate_hub() -> None:
    async with await psycopg.AsyncConnection.connect(**dedicated_parameters()) as connection:
        ended = await connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND query LIKE 'LISTEN%futures_finished%' "
            "AND pid <> pg_backend_pid()"
        )
        assert await ended.fetchall() == [(True,)]


@pytest.fixture
def held(submit: SubmitFactory, worker: Worker) -> Callable[[], Future]:
    def make() -> Future:
        submit()
        [future] = future_claim(worker=worker, max_futures=1, max_cost=1)
        return future

    return make


def wait(future: Future, timeout_seconds: float = LONG_SECONDS) -> asyncio.Task[Future | None]:
    return asyncio.create_task(
        future_wait(future.pk, owner_id=future.owner_id, timeout_seconds=timeout_seconds)
    )


def test_a_final_future_is_answered_at_once(held: Callable[[], Future], worker: Worker) -> None:
    future = held()
    finish(worker, future, result=b"r")

    ended = run(future_wait(future.pk, owner_id=future.owner_id, timeout_seconds=0))

    assert ended is not None
    assert (ended.state, bytes(ended.result)) == ("ready", b"r")
    assert "payload" in ended.get_deferred_fields()


def test_the_commit_wakes_every_waiter_of_its_futures_and_no_other(
    held: Callable[[], Future], worker: Worker
) -> None:
    first, second, other = held(), held(), held()

    async def main() -> None:
        waiters = [wait(first), wait(first), wait(second)]
        delayable = wait(other)
        await listening()
        await in_thread(partial(finish, worker, first, second, result=b"r"))

        ended = await asyncio.gather(*waiters)

        assert [future.pk for future in ended] == [first.pk, first.pk, second.pk]
        assert not delayable.done()
        delayable.cancel()

    run(main())


def test_a_cancellation_wakes_the_waiter(submit: SubmitFactory) -> None:
    future = submit()

    async def main() -> Future | None:
        waiter = wait(future)
        await listening()
        await in_thread(partial(future_cancel, request_id=future.pk, owner_id=future.owner_id))
        return await waiter

    ended = run(main())
    assert ended is not None
    assert ended.state == "cancelled"


def test_waiting_ends_with_none_when_the_time_is_up(submit: SubmitFactory) -> None:
    future = submit()

    assert run(future_wait(future.pk, owner_id=future.owner_id, timeout_seconds=0.05)) is None


def test_anothers_future_is_not_found(
    submit: SubmitFactory, owner_factory: Callable[[], Any]
) -> None:
    future = submit()

    with pytest.raises(FutureNotFound):
        run(future_wait(future.pk, owner_id=owner_factory().pk, timeout_seconds=1))


def test_a_stranger_who_waits_beside_the_owner_learns_nothing(
    held: Callable[[], Future], worker: Worker, owner_factory: Callable[[], Any]
) -> None:
    future, stranger = held(), owner_factory().pk

    async def together() -> list[Any]:
        waiting = [
            wait(future),
            asyncio.create_task(
                future_wait(future.pk, owner_id=stranger, timeout_seconds=LONG_SECONDS)
            ),
            wait(future),
        ]
        await listening()
        await in_thread(partial(finish, worker, future))
        return await asyncio.gather(*waiting, return_exceptions=True)

    first, other, second = run(together())

    assert isinstance(other, FutureNotFound)
    assert first.state == second.state == "ready"


def test_waiters_survive_the_loss_of_the_connection_and_of_what_it_missed(
    held: Callable[[], Future], worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "_RECONNECT_SECONDS", 0.2)
    missed, later = held(), held()

    async def main() -> list[Future | None]:
        waiters = [wait(missed), wait(later)]
        await listening()
        await terminate_hub()
        await in_thread(partial(finish, worker, missed, result=b"r"))
        first = await waiters[0]
        await in_thread(partial(finish, worker, later, result=b"r"))
        return [first, await waiters[1]]

    assert [future.state for future in run(main()) if future] == ["ready", "ready"]


@pytest.mark.parametrize(
    ("fields", "timeout_seconds", "heard"),
    [
        ({"delayable": True}, 1.0, Bell.FLUSH),
        ({"delayable": True}, 0, Bell.SILENT),  # only looks
        ({}, 0.3, Bell.SILENT),
    ],
)
def test_who_waits_for_what_a_worker_may_hold_back_says_so(
    submit: SubmitFactory,
    fields: dict[str, bool],
    timeout_seconds: float,
    heard: Bell,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_module, "LONGEST_DELAY", timedelta(minutes=1))
    bell_rang(QUEUE)  # begins to listen
    future = submit(**fields)
    rang = bell_rang(QUEUE, LONG_SECONDS)
    waited = future_wait(future.pk, owner_id=future.owner_id, timeout_seconds=timeout_seconds)

    assert run(waited) is None

    assert rang == (Bell.DELAYABLE if fields else Bell.RANG)
    assert bell_rang(QUEUE, LONG_SECONDS if heard else 0.0) == heard


def test_nobody_is_hurried_for_what_was_submitted_long_ago(
    submit: SubmitFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "LONGEST_DELAY", timedelta(0))
    bell_rang(QUEUE)
    future = submit(delayable=True)
    assert bell_rang(QUEUE, LONG_SECONDS) == Bell.DELAYABLE

    assert run(future_wait(future.pk, owner_id=future.owner_id, timeout_seconds=0.3)) is None

    assert bell_rang(QUEUE) == Bell.SILENT


def test_who_has_just_submitted_waits_for_postgres_before_the_first_look_too(
    held: Callable[[], Future], worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "_RECONNECT_SECONDS", 0.01)
    future = held()
    finish(worker, future, result=b"r")
    read, failures = FutureReader.read, [OperationalError("gone")] * 3

    async def away_at_first(self: FutureReader, request_id: str) -> Future | None:
        if failures:
            raise failures.pop()
        return await read(self, request_id)

    monkeypatch.setattr(FutureReader, "read", away_at_first)

    with pytest.raises(OperationalError):
        run(future_wait(future.pk, owner_id=future.owner_id, timeout_seconds=LONG_SECONDS))
    ended = run(
        future_wait(
            future.pk, owner_id=future.owner_id, timeout_seconds=LONG_SECONDS, is_known=True
        )
    )

    assert ended is not None
    assert failures == []


def test_who_gives_up_leaves_nothing_behind(submit: SubmitFactory) -> None:
    future = submit()

    async def main() -> None:
        waiter = wait(future)
        await listening()
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        assert waiters()._waiting == {}

    run(main())


def test_a_hundred_waiters_hold_two_connections(held: Callable[[], Future], worker: Worker) -> None:
    future = held()

    async def main() -> None:
        before = len(await hub_queries())
        waiters = [wait(future) for _ in range(100)]
        await listening()
        while len(await hub_queries()) > before + 2:  # one listens, one reads
            await asyncio.sleep(0.01)
        await in_thread(partial(finish, worker, future, result=b"r"))
        ended = await asyncio.gather(*waiters)
        assert {future.pk for future in ended} == {future.pk}

    run(main())
