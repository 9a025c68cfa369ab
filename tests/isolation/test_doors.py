"""Every address: nothing of a large body is read before the key, and no JSON takes much memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import zstandard
from django.contrib.auth import get_user_model
from django.urls import get_resolver
from pytest_django import Settings

from tests.api.test_asgi import scope_of
from tests.isolation.test_routes import addresses
from tests.waiting import LONG_SECONDS
from tinkerapi.api.bodies import json_limits
from tinkerapi.asgi import application
from tinkerapi.services import api_key_create

METHODS = ("POST", "PUT", "DELETE")
SDK = {"x-stainless-package-version": "0.38.0"}
OPEN = {"healthz", "readyz", "", "api/schema", "api/v1/healthz"}
PAGES = {
    "favicon.ico",
    "admin",
    "admin/invitation/<uidb64>/<token>/",
    "docs",
    "docs/",
    "docs/<slug:folder>/<str:name>",
    "docs/<slug:name>",
    "docs/<slug:name>/",
    "api/docs",
    "api/docs/",
}
BODY_NOT_DECODED = {
    "api/v1/client/config",
    "api/v1/client/dynamic_config",
    "api/v1/telemetry",
    "api/v1/auth/token",
    "api/v1/auth/apikey/me",
    "api/v1/downloads/<str:token>/<str:file_name>",
}


def filled(route: str) -> str:
    """An address of this route, of things that do not exist."""
    for name in ("run", "session_id", "sampling_session_id", "model_id", "token", "file_name"):
        route = route.replace(f"<str:{name}>", "nothing")
    return "/" + route.replace("<path:checkpoint_id>", "weights/none").replace("<path:model>", "m")


def routes() -> list[str]:
    return sorted(set(addresses(get_resolver())) - PAGES)


class Exchange:
    """One request through the application, and what of its body was read before the answer."""

    def __init__(self, path: str, method: str, headers: dict[str, str], body: bytes) -> None:
        self.read_first = 0
        self.status = 0
        self.content = b""
        asyncio.run(self._run(scope_of(path, method, headers), body))

    async def _run(self, scope: dict[str, Any], body: bytes) -> None:
        over = asyncio.Event()
        pieces: Iterator[bytes] = iter(
            [body[i : i + 65536] for i in range(0, len(body) + 65536, 65536)]
        )

        async def receive() -> dict[str, Any]:
            piece = next(pieces, None)
            if piece is None:
                await over.wait()
            elif not self.status:  # nothing was answered yet
                self.read_first += len(piece)
            return {"type": "http.request", "body": piece, "more_body": True} if piece else _END

        async def send(message: Any) -> None:
            self.status = message.get("status", self.status)
            self.content += message.get("body", b"")

        await asyncio.wait_for(application(scope, receive, send), LONG_SECONDS)


_END: dict[str, Any] = {"type": "http.request", "body": b"", "more_body": False}


@pytest.mark.parametrize("key", [None, "tml-wrong"])
@pytest.mark.parametrize(
    "length", [{"content-length": str(20 * 2**20)}, {"transfer-encoding": "chunked"}]
)
def test_without_a_good_key_nothing_of_a_large_body_is_read(
    transactional_db: None,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    key: str | None,
    length: dict[str, str],
) -> None:
    settings.REQUIRE_API_KEY = True
    monkeypatch.setattr("tinkerapi.api.bodies.limit.PAST_ANSWER_SECONDS", 0.001)
    headers = length | ({} if key is None else {"x-api-key": key})

    for route in routes():
        for method, more in ((method, more) for method in METHODS for more in ({}, SDK)):
            answer = Exchange(filled(route), method, headers | more, b"x" * 2**20)

            assert answer.read_first == 0, (route, method, more)
            is_open = route in OPEN or "downloads" in route
            expected = (405, 413) if is_open else (401,)
            assert answer.status in expected, (route, method, answer.content)


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """JSON beyond the limits, which are lowered so that it is short."""
    monkeypatch.setattr(json_limits, "MAX_CONTAINERS", 300)
    monkeypatch.setattr(json_limits, "MAX_VALUES", 2000)
    ids = b'{"seq_id": 1, "model_id": "m", "request_id": "r", "data": '
    return {
        "nests": ids + b"[" * 500 + b"]" * 500 + b"}",
        "lists and objects": ids + b"[" + b'{"a":[]},' * 200 + b"0]}",
        "values": ids + b"[" + b"1," * 3000 + b"1]}",
    }


def test_json_that_would_take_much_memory_is_refused(
    transactional_db: None, hostile: dict[str, bytes]
) -> None:
    user = get_user_model().objects.create_user("mallory")
    compress = zstandard.ZstdCompressor().compress
    refused = set()

    for route in [route for route in routes() if route not in OPEN]:
        _, key = api_key_create(user=user, name="k")
        for name, body in hostile.items():
            for more in ({}, SDK, SDK | {"content-encoding": "zstd"}):
                sent = compress(body) if "content-encoding" in more else body
                headers = more | {"content-length": str(len(sent)), "x-api-key": key}
                answer = Exchange(filled(route), "POST", headers, sent)
                if answer.status == 405:
                    answer = Exchange(filled(route), "PUT", headers, sent)

                where = (route, name, more, answer.status, answer.content)
                if route in BODY_NOT_DECODED:
                    assert answer.status < 500, where
                    continue
                assert 400 <= answer.status < 500, where
                if b"this server's limit" in answer.content:
                    assert name in answer.content.decode(), where
                    refused.add(route)
    assert {"fwd", "api/v1/sample", "v1/completions", "api/v1/create_session"} <= refused
    assert len(refused) > 40
