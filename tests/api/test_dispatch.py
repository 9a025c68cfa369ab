"""Which dialect a request at a shared address speaks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from django.test import RequestFactory
from pytest_django import Settings

from tests.conftest import ApiClient
from tinkerapi.api.bodies.limit import HOLDS_SEQ_ID, Admitted, Body
from tinkerapi.api.dialect import PROTOBUF
from tinkerapi.api.dispatch import speaks_sdk

JSON = "application/json"
SDK = {"X-Stainless-Package-Version": "0.38.0"}


@pytest.mark.parametrize(
    ("body", "content_type", "headers", "expected"),
    [
        (b"{}", JSON, SDK, True),
        (b"?", PROTOBUF, {}, True),
        (b'{"seq_id": 1}', JSON, {}, True),
        (b'{"data": [{"seq_id": 1}]}', JSON, {}, False),
        (b'{"model_id": "m"}', JSON, {}, False),
        (b'{"seq_id": ', JSON, {}, False),
        (b'["seq_id"]', JSON, {}, False),
        (b"", "", {}, False),
    ],
)
def test_headers_and_the_number_tell_the_dialect(
    body: bytes, content_type: str, headers: dict[str, str], expected: bool
) -> None:
    request = RequestFactory().post("/", body, content_type=content_type, headers=headers)

    assert asyncio.run(speaks_sdk(request)) is expected


def test_a_body_that_is_too_large_is_the_quick_references_to_refuse(
    settings: Settings,
) -> None:
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 10
    request = RequestFactory().post("/", b'{"seq_id": 1}', content_type=JSON)

    assert not asyncio.run(speaks_sdk(request))


@pytest.mark.parametrize(
    ("pieces", "held"),
    [
        ([b'{"seq_id": 1}'], True),
        ([b'{"se', b'q_id": 1}'], True),
        ([b'{"', b"s", b"e", b"q", b"_", b"i", b"d", b'": 1}'], True),
        ([b'{"seq_', b"id", b'" : 1}'], True),
        ([b'{"seq_', b"xx", b'id": 1}'], False),
        ([b'{"model_id": "m"}'], False),
        ([b""], False),
    ],
)
def test_the_number_is_seen_as_the_body_passes_however_it_is_cut(
    pieces: list[bytes], held: bool
) -> None:
    scope: Any = {}
    arriving = iter(pieces)

    async def receive() -> Any:
        return {"type": "http.request", "body": next(arriving), "more_body": True}

    async def run() -> None:
        body = Body(scope, receive, Admitted(1000))
        for _ in pieces:
            await body.receive()

    asyncio.run(run())

    assert scope[HOLDS_SEQ_ID] is held


def test_a_body_without_the_number_is_not_read_to_tell_the_dialect() -> None:
    request: Any = RequestFactory().post("/", b'{"model_id": "m"}', content_type=JSON)
    request.scope = {HOLDS_SEQ_ID: False}

    assert not asyncio.run(speaks_sdk(request))
    assert not hasattr(request, "_body")


def test_the_quick_reference_still_has_its_answers_at_the_shared_addresses(
    served_api: ApiClient,
) -> None:
    hi = [[{"role": "user", "content": "hi"}]]
    answer = served_api.post("/api/v1/forward_backward", model_id="m", data=hi)

    assert answer.status_code == 200
    assert {"loss", "num_samples", "backend"} <= set(answer.json())
