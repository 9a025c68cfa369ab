"""Reading for many waiters at once: shared statements, lost connections, no Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import psycopg
import pytest
from django.db import OperationalError

from futures import batched_reads as reader_module
from futures.batched_reads import MAX_IDS, FutureReader
from futures.claiming import future_claim
from futures.database import dedicated_parameters
from futures.models import Worker
from tests.futures.conftest import SubmitFactory, finish
from tests.waiting import LONG_SECONDS

pytestmark = pytest.mark.django_db(transaction=True)

Result = TypeVar("Result")


def run(reader: FutureReader, main: Coroutine[Any, Any, Result]) -> Result:
    async def inner() -> Result:
        try:
            return await asyncio.wait_for(main, LONG_SECONDS)
        finally:
            await reader.close()

    return asyncio.run(inner())


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many ids each statement asked for."""
    asked: list[int] = []
    read = reader_module.futures_by_id

    async def counted(connection: Any, request_ids: list[str]) -> Any:
        asked.append(len(request_ids))
        return await read(connection, request_ids)

    monkeypatch.setattr(reader_module, "futures_by_id", counted)
    return asked


def test_a_future_is_read_as_the_orm_reads_it_but_without_its_payload(
    submit: SubmitFactory, worker: Worker
) -> None:
    future = submit(summary={"datums": 2})
    future_claim(worker=worker, max_futures=1, max_cost=1)
    finish(worker, future, result=b"r")
    future.refresh_from_db()

    reader = FutureReader()
    read = run(reader, reader.read(future.pk))

    assert read is not None
    assert read.get_deferred_fields() == {"payload"}
    for field in future._meta.concrete_fields:
        if field.attname not in ("payload", "result", "payload_digest"):
            assert getattr(read, field.attname) == getattr(future, field.attname), field
    assert bytes(read.result) == b"r"


def test_what_is_asked_for_together_is_read_together(
    submit: SubmitFactory, statements: list[int]
) -> None:
    futures = [submit() for _ in range(3)]
    reader = FutureReader()

    async def main() -> list[Any]:
        return await asyncio.gather(
            *(reader.read(future.pk) for future in futures * 2), reader.read("unknown")
        )

    found = run(reader, main())

    assert [future and future.pk for future in found] == [f.pk for f in futures * 2] + [None]
    assert statements == [4]


def test_one_statement_reads_so_many_at_most(statements: list[int]) -> None:
    reader = FutureReader()

    async def main() -> list[Any]:
        return await asyncio.gather(*(reader.read(f"unknown {i}") for i in range(MAX_IDS + 5)))

    assert set(run(reader, main())) == {None}
    assert statements == [MAX_IDS, 5]


def test_a_connection_that_was_lost_in_between_is_replaced(submit: SubmitFactory) -> None:
    future = submit()
    reader = FutureReader()

    async def main() -> list[Any]:
        before = await reader.read(future.pk)
        async with await psycopg.AsyncConnection.connect(**dedicated_parameters()) as connection:
            ended = await connection.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE query LIKE '%futures_future WHERE id = ANY%' AND pid <> pg_backend_pid()"
            )
            assert await ended.fetchall() == [(True,)]
        return [before, await reader.read(future.pk)]

    assert [found.pk for found in run(reader, main())] == [future.pk] * 2


def test_without_postgres_everyone_who_asked_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        reader_module, "dedicated_parameters", lambda: {"host": "127.0.0.1", "port": "1"}
    )
    reader = FutureReader()

    async def main() -> list[Any]:
        return await asyncio.gather(
            reader.read("one"), reader.read("other"), return_exceptions=True
        )

    assert [type(outcome) for outcome in run(reader, main())] == [OperationalError] * 2


def test_nobody_waits_for_a_reader_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def out_of_memory(connection: Any, request_ids: list[str]) -> Any:
        raise MemoryError

    monkeypatch.setattr(reader_module, "futures_by_id", out_of_memory)
    reader = FutureReader()

    async def main() -> list[Any]:
        names = [f"unknown {i}" for i in range(MAX_IDS + 5)]
        return await asyncio.gather(*map(reader.read, names), return_exceptions=True)

    assert {type(outcome) for outcome in run(reader, main())} == {OperationalError}
