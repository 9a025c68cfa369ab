"""OpenAI's shape and ``x-request-id`` on every answer below ``/v1``.

Views below it use this shape themselves. Answers made before a view runs (an unknown address, a
body that is too large, a malformed request) have the shape of the other
dialects, and OpenAI's clients would not show their message.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson

from tinkerapi.api.bodies.limit import Application, Message, Receive, Scope, Send
from tinkerapi.api.openai.error_body import REQUEST_ID, error_body
from tinkerapi.api.renderers import to_json

MAX_ERROR_BYTES = 100_000
"""No error of ours is larger."""


def openai_shape(application: Application) -> Application:
    """The application, with its answers below ``/v1`` in OpenAI's shape."""

    async def shaped(scope: Scope, receive: Receive, send: Send) -> None:
        is_openai = scope["type"] == "http" and f"{scope['path']}/".startswith("/v1/")
        await application(scope, receive, _ShapedSend(send) if is_openai else send)

    return shaped


class _ShapedSend:
    """Forwards an answer; an error's body is held until it is complete and can be changed."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= HTTPStatus.BAD_REQUEST:
                self._start = message
                return
            await self._send(_with_headers(message, {}))
        elif self._start is None:
            await self._send(message)
        else:
            if len(self._body) < MAX_ERROR_BYTES:
                self._body += message.get("body", b"")
            more_body = message.get("more_body", False)
            # A refused body may still be arriving: its answer does not wait for that.
            if not more_body or len(self._body) == _declared_length(self._start):
                start, self._start = self._start, None
                body, headers = _shaped_error(start["status"], self._body)
                await self._send(_with_headers(start, headers))
                await self._send({**message, "body": body})


def _shaped_error(status: int, body: bytes) -> tuple[bytes, dict[str, str]]:
    """The error's body and the headers that go with it."""
    headers = {"content-type": "application/json"}
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        said = None
    if not isinstance(said, dict):
        said = {}
    if "error" not in said:
        detail = said.get("detail") or HTTPStatus(status).phrase
        if "log_id" in said:
            headers[REQUEST_ID] = said["log_id"]
        body = to_json(error_body(status, str(detail), str(said.get("error_code", "BadRequest"))))
    headers["content-length"] = str(len(body))
    return body, headers


def _with_headers(start: Message, headers: Mapping[str, str]) -> Message:
    """The beginning of an answer, with these headers, and an id if it has none."""
    replaced = {name.encode(): value.encode() for name, value in headers.items()}
    kept = [(name, value) for name, value in start["headers"] if name.lower() not in replaced]
    merged: list[tuple[Any, Any]] = [*kept, *replaced.items()]
    if not any(name.lower() == REQUEST_ID.encode() for name, _ in merged):
        merged.append((REQUEST_ID.encode(), f"req_{secrets.token_hex(16)}".encode()))
    return {**start, "headers": merged}


def _declared_length(start: Message) -> int | None:
    for name, value in start["headers"]:
        if bytes(name).lower() == b"content-length":
            return int(value)
    return None
