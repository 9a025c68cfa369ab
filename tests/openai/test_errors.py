"""Every answer below /v1 has OpenAI's shape and an id, wherever the error is found."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from futures.models import Future
from tests.openai.test_completions import HELLO, MODEL, chat, complete
from tests.openai.test_streaming import stream_chat
from tinkerapi.api.async_view import AsyncAPIView
from tinkerapi.asgi import application


def answer(method: str, path: str, **request: Any) -> httpx2.Response:
    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=application, raise_app_exceptions=False)
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://localhost", headers={"Origin": "http://localhost"}
        ) as client:
            return await client.request(method, path, **request)

    return asyncio.run(ask())


def check(response: httpx2.Response, status: int, code: str, param: str | None = None) -> None:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert error["message"]
    assert response.headers["x-request-id"]
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["content-length"]) == len(response.content)


ROOT = Path(__file__).resolve().parents[2]
BROKEN = {"content": b"{", "headers": {"Content-Type": "application/json"}}
PLAIN = {"content": b"{}", "headers": {"Content-Type": "text/plain"}}
LARGE = {"content": b"x", "headers": {"Content-Length": "9" * 12}}


@pytest.mark.parametrize(
    ("method", "path", "request_", "status", "code"),
    [
        ("GET", "/v1", {}, 404, "unknown_url"),
        ("GET", "/v1/", {}, 404, "unknown_url"),
        ("POST", "/v1/embeddings", {"json": {}}, 404, "unknown_url"),
        ("POST", "/v1/completions/", {"json": {}}, 404, "unknown_url"),
        ("GET", "/v1/completions", {}, 405, "method_not_supported"),
        ("DELETE", "/v1/models", {}, 405, "method_not_supported"),
        ("GET", "/v1/models", {"headers": {"Authorization": "Bearer x"}}, 401, "invalid_api_key"),
        ("GET", "/v1/models", {"headers": {"Host": "evil.example"}}, 401, "invalid_api_key"),
        ("POST", "/v1/completions", BROKEN, 400, "ParseError"),
        ("POST", "/v1/completions", PLAIN, 415, "UnsupportedMediaType"),
        ("POST", "/v1/completions", LARGE, 413, "BodyTooLarge"),
        ("GET", "/v1/models/nothing", {}, 404, "model_not_found"),
    ],
)
def test_an_error_has_openais_shape_wherever_it_is_found(
    served_api, method, path, request_, status, code
):
    param = "model" if code == "model_not_found" else None
    check(answer(method, path, **request_), status, code, param)


def test_other_addresses_keep_their_shape(served_api):
    missing = answer("GET", "/v11/models")
    assert (missing.status_code, missing.json()["error_code"]) == (404, "NotFound")
    assert "x-request-id" not in missing.headers


def test_an_error_that_nobody_planned_names_its_line_in_the_log(served_api, monkeypatch, caplog):
    def fail(self: AsyncAPIView, request: Any) -> None:
        raise RuntimeError("unplanned")

    monkeypatch.setattr(AsyncAPIView, "_handle", fail)
    response = answer("GET", "/v1/models")
    check(response, 500, "ServerError")
    assert response.headers["x-request-id"] in caplog.text


@pytest.mark.parametrize(
    ("create", "field", "fields"),
    [
        (chat, "messages", {"messages": [{"role": "user", "content": "x" * 600}]}),
        (stream_chat, "messages", {"messages": [{"role": "user", "content": "x" * 600}]}),
        (complete, "prompt", {"prompt": "x" * 600}),
    ],
)
def test_a_prompt_beyond_the_context_is_told_as_clients_look_for_it(user, create, field, fields):
    with pytest.raises(openai.BadRequestError) as refused:
        create(user, **fields)
    error = refused.value
    assert (error.code, error.param) == ("context_length_exceeded", field)
    assert "this model's maximum context length is 512 tokens" in error.message
    assert error.request_id == Future.objects.get().id


def test_an_answer_has_its_futures_id(user):
    answered = complete(user)
    assert answered._request_id == answered.id
    listed = user(lambda client: client.models.list())
    assert listed._request_id.startswith("req_")
    with pytest.raises(openai.NotFoundError) as missing:
        chat(user, model="no/model", messages=HELLO)
    assert missing.value.code == "model_not_found"
    assert missing.value.request_id.startswith("req_")
    assert listed.data[0].id == MODEL


def test_the_application_is_there_before_django_is_set_up():
    """As when a server starts: views and models are loaded only after that."""
    code = "from tinkerapi.asgi import application; print(callable(application))"
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.stdout.strip() == "True", done.stderr
