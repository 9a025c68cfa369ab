"""Notes about a future reach its followers only."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from futures.claiming import future_claim
from futures.errors import FutureNotFound
from futures.models import Future, Worker
from futures.notify import notify_progress
from futures.waiters import future_progress, waiters
from tests.futures.conftest import SubmitFactory, finish
from tests.futures.test_waiters import in_thread, listening, run
from tests.waiting import LONG_SECONDS

pytestmark = pytest.mark.django_db(transaction=True)


def follow(future: Future, owner_id: int, heard: list[str]) -> asyncio.Task[None]:
    async def read() -> None:
        async for note in future_progress(
            future.id, owner_id=owner_id, timeout_seconds=LONG_SECONDS
        ):
            heard.append(note)

    return asyncio.create_task(read())


def test_followers_hear_the_notes_in_order_until_the_end(submit: SubmitFactory, worker: Worker):
    submit()
    submit()
    mine, other = future_claim(worker=worker, max_futures=2, max_cost=2)

    async def main() -> list[list[str]]:
        heard: list[list[str]] = [[], []]
        following = [follow(mine, mine.owner_id, notes) for notes in heard]
        await listening()
        notes = [(mine.id, "one  é"), (other.id, "not this"), (mine.id, '"two"\\u0000')]
        await in_thread(lambda: notify_progress(notes))
        await in_thread(lambda: finish(worker, mine))
        await asyncio.gather(*following)
        assert waiters()._following == {}
        return heard

    assert run(main()) == [["one  é", '"two"\\u0000']] * 2


def test_nobody_follows_another_owners_future(submit: SubmitFactory, worker: Worker):
    submit()
    [future] = future_claim(worker=worker, max_futures=1, max_cost=1)

    async def main() -> Any:
        with pytest.raises(FutureNotFound):
            await follow(future, future.owner_id + 1, [])

    run(main())
