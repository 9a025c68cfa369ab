"""The ASGI application as the server calls it: large bodies, pages, host names."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connection

from futures.waiters import waiters
from tests.waiting import LONG_SECONDS
from tinkerapi.api.threads import DATABASE_THREADS
from tinkerapi.asgi import application
from tinkerapi.handlers import ApiHandler


def scope_of(
    path: str, method: str = "POST", headers: dict[str, str] | None = None
) -> dict[str, Any]:
    names = {"host": "localhost", "content-type": "application/json", **(headers or {})}
    return {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in names.items()],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
        "scheme": "http",
    }


def call(
    path: str,
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    body: Iterable[bytes],
    http_version: str = "1.1",
) -> tuple[int, dict[str, str], bytes]:
    """One request through the application; body chunks are only made when they are read."""
    chunks, sent = iter(body), []
    scope = {**scope_of(path, method, headers), "http_version": http_version}

    async def run() -> None:
        over = asyncio.Event()

        async def receive() -> dict[str, Any]:
            chunk = next(chunks, None)
            if chunk is None:
                await over.wait()
            return {"type": "http.request", "body": chunk, "more_body": chunk != b""}

        async def send(message: Any) -> None:
            sent.append(message)

        await application(scope, receive, send)

    async_to_sync(run)()
    answer = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], answer, b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.parametrize(
    ("path", "limit"),
    [("/fwdbwd", 32 * 2**20), ("/optim_step", 2**18), ("/retrieve_future", 2**18)],
)
def test_a_body_too_large_by_its_length_is_refused_before_it_is_read(
    transactional_db, monkeypatch, path, limit
):
    monkeypatch.setattr("tinkerapi.api.bodies.limit.PAST_ANSWER_SECONDS", 0.01)
    status, headers, body = call(path, headers={"content-length": str(limit + 1)}, body=[])

    assert status == 413
    assert headers["connection"] == "close"
    assert f"{limit} bytes" in json.loads(body)["detail"]


def test_a_websocket_is_refused():
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(application({"type": "websocket", "path": "/", "headers": []}, None, send))

    assert sent == [{"type": "websocket.close"}]


def test_a_body_without_a_length_is_cut_off_at_the_limit(transactional_db, settings, monkeypatch):
    settings.MAX_BODY_BYTES = 2**20
    read = 0

    def endless() -> Iterable[bytes]:
        nonlocal read
        while True:
            read += 2**16
            yield b"x" * 2**16

    monkeypatch.setattr("tinkerapi.api.bodies.limit.PAST_ANSWER_SECONDS", 0.01)
    status, _, body = call("/fwdbwd", headers={"transfer-encoding": "chunked"}, body=endless())

    assert status == 413
    assert json.loads(body)["error_code"] == "BodyTooLarge"
    assert read <= 2**20 + 2**16


def test_a_body_in_chunks_without_a_length_is_read_whole(transactional_db):
    status, _, body = call("/retrieve_future", body=[b'{"request', b'_id": 7}', b""])

    assert status == 400
    assert json.loads(body)["detail"] == "request_id: expected text of 1 to 100 characters; got 7"


def test_the_api_goes_round_the_middleware_and_pages_do_not(db):
    _, api, _ = call("/healthz", method="GET", body=[b""])
    _, page, _ = call("/docs/", method="GET", body=[b""])

    assert ApiHandler()._view_middleware == []
    assert "x-frame-options" not in api
    assert page["x-frame-options"] == "DENY"
    assert api["x-content-type-options"] == page["x-content-type-options"] == "nosniff"
    assert int(api["content-length"]) > 0


@pytest.mark.parametrize("path", ["/nothing", "/api/v1/nothing"])
def test_an_unknown_address_is_json_without_middleware_too(path):
    status, headers, body = call(path, method="GET", body=[b""])

    assert status == 404
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["error_code"] == "NotFound"


def test_a_database_thread_notices_that_its_connection_was_lost(transactional_db):
    def ask() -> int:
        return call("/cancel_future", body=[b'{"request_id": "unknown"}', b""])[0]

    answers = [ask() for _ in range(DATABASE_THREADS)]
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert cursor.fetchall()
    answers += [ask() for _ in range(DATABASE_THREADS)]

    assert answers == [404] * 2 * DATABASE_THREADS


def test_a_wait_ends_when_its_client_goes_away(transactional_db):
    """The answer would come after five minutes, for no worker is there."""
    body = {"model_id": "m", "data": [[{"role": "user", "content": "hi"}]]}
    waiting: list[int] = []

    async def run() -> None:
        async def receive() -> dict[str, Any]:
            if not waiting:
                waiting.append(0)
                return {"type": "http.request", "body": json.dumps(body).encode()}
            while not (known := len(waiters()._waiting)):
                await asyncio.sleep(0.01)
            waiting.append(known)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            raise AssertionError(message)

        await application(scope_of("/api/v1/forward_backward"), receive, send)
        waiting.append(len(waiters()._waiting))

    asyncio.run(asyncio.wait_for(run(), LONG_SECONDS))
    assert waiting == [0, 1, 0]
