"""A body that is too large uses its number, if number and model are at its beginning."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import zstandard

from futures.models import Future
from tests.api.test_asgi import call
from tests.conftest import InProcessWorker
from tests.sdk.conftest import SdkClient
from tests.sdk.official_sdk import sdk_body, sdk_datum
from tests.sdk.test_refused_numbers import JSON_ONLY
from tinkerapi.api.bodies.limit import HEAD_BYTES
from tinkerapi.api.dialect import PROTOBUF

JSON = "application/json"
TOO_LARGE = 2**20
"""The largest body of these tests is larger."""


@pytest.fixture(autouse=True)
def small_limit(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.MAX_BODY_BYTES = TOO_LARGE
    monkeypatch.setattr("tinkerapi.api.bodies.limit.PAST_ANSWER_SECONDS", 0.01)


def message(model_id: str, seq_id: int) -> bytes:
    """What the SDK sends, with more tokens than the limit, and hard to compress."""
    source = random.Random(0)  # noqa: S311
    tokens = [source.randrange(2**31) for _ in range(TOO_LARGE // 2)]
    datum = sdk_datum(tokens, target_tokens=tokens)
    body: bytes = sdk_body([datum], model_id=model_id, seq_id=seq_id)
    return body


def step(model_id: str, seq_id: Any, *, ids_first: bool = True) -> bytes:
    """An ``optim_step`` over the limit of addresses that take no data."""
    ids = f'"model_id": "{model_id}", "seq_id": {seq_id}'
    more = '"x": "' + "x" * HEAD_BYTES + '"'
    return ("{" + ", ".join((ids, more) if ids_first else (more, ids)) + "}").encode()


def asked(
    sdk: SdkClient, path: str, body: bytes, *, declared: bool = True, **headers: str
) -> tuple[int, Any]:
    """Sent to the application as a server does, in parts of 64 KiB."""
    size = {"content-length": str(len(body))} if declared else {"transfer-encoding": "chunked"}
    parts = [body[at : at + 2**16] for at in range(0, len(body), 2**16)]
    named = {**sdk.headers, **size, **headers}
    headers = {name.lower(): value for name, value in named.items()}
    status, _, content = call(f"/api/v1/{path}", headers=headers, body=[*parts, b""])
    return status, json.loads(content)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("encoding", ["identity", "zstd"])
def test_a_message_over_the_limit_fails_by_its_number_and_the_next_request_runs(
    sdk: SdkClient, work: InProcessWorker, declared: bool, encoding: str
) -> None:
    model_id = sdk.model()
    body = message(model_id, 1)
    if encoding == "zstd":
        body = zstandard.compress(body)
        assert len(body) > TOO_LARGE
    form = {"content-type": PROTOBUF, "content-encoding": encoding}
    answers = [asked(sdk, "forward_backward", body, declared=declared, **form) for _ in range(2)]
    last = sdk.forward_backward(model_id, 2)
    work()

    assert answers[0] == answers[1] == (200, {"request_id": answers[0][1]["request_id"],
                                              "model_id": model_id})  # fmt: skip
    failed = Future.objects.get(pk=answers[0][1]["request_id"])
    assert (failed.state, failed.category, failed.error_code) == ("failed", "user", "BodyTooLarge")
    assert f"larger than {TOO_LARGE} bytes" in failed.error
    assert sdk.result(last).metrics


def test_a_message_that_is_too_large_once_decompressed_uses_its_number(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = sdk.model()
    tokens = [1] * TOO_LARGE
    body = sdk_body([sdk_datum(tokens, target_tokens=tokens)], model_id=model_id, seq_id=1)
    form = {"content-type": PROTOBUF, "content-encoding": "zstd"}
    status, answer = asked(sdk, "forward_backward", zstandard.compress(body), **form)
    last = sdk.forward_backward(model_id, 2)
    work()

    assert status == 200
    assert "once decompressed" in Future.objects.get(pk=answer["request_id"]).error
    assert sdk.result(last).metrics


@pytest.mark.parametrize("declared", [True, False])
def test_json_over_the_limit_uses_the_number_at_its_beginning(
    sdk: SdkClient, work: InProcessWorker, declared: bool
) -> None:
    model_id = sdk.model()
    status, answer = asked(sdk, "optim_step", step(model_id, 1), declared=declared)
    last = sdk.forward_backward(model_id, 2)
    work()

    assert (status, answer["model_id"]) == (200, model_id)
    assert sdk.result(last).metrics


def test_every_numbered_address_uses_the_number_of_what_is_too_large_once_decompressed(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = sdk.model()
    for number, path in enumerate(JSON_ONLY, 1):
        body = zstandard.compress(step(model_id, number))
        status, answer = asked(sdk, path, body, **{"content-encoding": "zstd"})
        assert status == 200, (path, answer)
    last = sdk.forward_backward(model_id, len(JSON_ONLY) + 1)
    work()

    assert sdk.result(last).metrics


def test_a_number_that_is_not_at_the_beginning_is_not_guessed(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    """Nor one of which the beginning has only some digits."""
    model_id = sdk.model()
    work()
    ids = f'{{"model_id": "{model_id}", '
    cut = (ids + " " * (HEAD_BYTES - len(ids) - len('"seq_id": 12'))).encode()
    bodies = [
        step(model_id, 1, ids_first=False),
        cut + b'"seq_id": 1234, "x": "' + b"x" * HEAD_BYTES + b'"}',
        step("of-nobody", 1),
        b"x" * (HEAD_BYTES + 1),
    ]
    for body in bodies:
        status, answer = asked(sdk, "optim_step", body)
        assert (status, answer["error_code"]) == (413, "BodyTooLarge"), answer
    assert not Future.objects.filter(lane_id=model_id, kind="refused").exists()


def test_a_number_of_another_request_is_not_taken(sdk: SdkClient, work: InProcessWorker) -> None:
    model_id = sdk.model()
    first = sdk.forward_backward(model_id, 1)
    status, answer = asked(sdk, "optim_step", step(model_id, 1))
    work()

    assert (status, answer["error_code"]) == (422, "SeqIdReused")
    assert sdk.result(first).metrics


def test_nobody_without_a_key_is_read(sdk: SdkClient) -> None:
    body = step("m", 1)
    sdk.headers["X-API-Key"] = "tml-wrong"
    status, _ = asked(sdk, "optim_step", body)

    assert status == 401
