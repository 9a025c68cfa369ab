"""vLLM's HTTP routes, as far as the sampler uses them.

Every failure is one of two: ``ServerLost``, after which nothing is known of the request, and
``ServerRefuses``, an answer that says no.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpx2
import orjson

from training.vllm_server import VllmConnection

logging.getLogger("httpx2").setLevel(logging.WARNING)  # otherwise a line for each request

CONNECT_SECONDS = 5.0
CONTROL_SECONDS = 60.0
"""Longest time of an answer that computes no tokens; loading an adapter waits for a step."""

KEEP_ALIVE_SECONDS = 2.0
"""A connection that was idle for longer is not used again. The server closes one after 5 seconds,
and a request that it meets is lost, with it the server's life."""

REQUEST_PREFIX = "generate-tokens-"
"""vLLM's own addition to the ids of these requests."""

MAX_REASON_CHARACTERS = 300


class ServerLost(Exception):
    """The server did not answer, or its engine has failed."""


class ServerRefuses(Exception):
    """The server answered that it does not do this."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"status {status}: {reason}")
        self.status = status


class WrongAnswer(Exception):
    """The server's answer is not that of the request."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What a server says of itself."""

    name: str
    """Of its base model."""
    context_tokens: int
    adapters: Mapping[str, str]
    """Name of each loaded adapter to its path."""


class VllmClient:
    """One server. All of it belongs to one event loop."""

    def __init__(self, connection: VllmConnection) -> None:
        headers = {"Authorization": f"Bearer {connection.key}"} if connection.key else {}
        self._http = httpx2.AsyncClient(
            base_url=connection.address,
            headers={**headers, "Content-Type": "application/json"},
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(
                max_connections=None,
                max_keepalive_connections=64,
                keepalive_expiry=KEEP_ALIVE_SECONDS,
            ),
            trust_env=False,  # a proxy is for the internet, not for this server
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def is_healthy(self) -> bool:
        """Whether its engine runs."""
        if self._http.is_closed:
            return False
        try:
            answer = await self._http.get("/health", timeout=CONNECT_SECONDS)
        except (httpx2.TransportError, httpx2.InvalidURL):
            return False
        return answer.status_code == HTTPStatus.OK

    async def served_model(self) -> ServedModel:
        """Its base model and its adapters.

        Raises:
            ServerLost, ServerRefuses, WrongAnswer: See the module.
        """
        content = await self._answer("GET", "/v1/models", None, CONTROL_SECONDS)
        try:
            cards = content["data"]
            base = next(card for card in cards if not card.get("parent"))
            return ServedModel(
                name=base["id"],
                context_tokens=int(base["max_model_len"]),
                adapters={card["id"]: card["root"] for card in cards if card.get("parent")},
            )
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise WrongAnswer(f"/v1/models: {error!r}") from error

    async def load(self, name: str, path: str) -> None:
        """Load an adapter's folder under a name that was never used before."""
        await self._answer(
            "POST",
            "/v1/load_lora_adapter",
            {"lora_name": name, "lora_path": path},
            CONTROL_SECONDS,
        )

    async def ensure_loaded(self, name: str, path: str) -> None:
        """``load``, unless the server has the adapter: a life may end without the server's."""
        try:
            await self.load(name, path)
        except ServerRefuses:
            if (await self.served_model()).adapters.get(name) != path:
                raise

    async def forget(self, name: str) -> None:
        """``unload``, unless the server does not have it."""
        with suppress(ServerRefuses):
            await self.unload(name)

    async def unload(self, name: str) -> None:
        """Forget a name. The engine keeps the adapter until it needs the room."""
        await self._answer("POST", "/v1/unload_lora_adapter", {"lora_name": name}, CONTROL_SECONDS)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End requests, as far as the server still has them."""
        ids = [REQUEST_PREFIX + request_id for request_id in request_ids]
        await self._answer(
            "POST", "/inference/v1/abort_requests", {"request_ids": ids}, CONTROL_SECONDS
        )

    async def generate(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The whole answer of a request; see ``vllm.requests`` for the body."""
        content = await self._answer("POST", "/inference/v1/generate", body, None)
        if not isinstance(content, dict):
            raise WrongAnswer("expected an object")
        return content

    @asynccontextmanager
    async def stream(self, body: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """The chunks of a request's answer. Leaving early ends the request."""
        self._require_open()
        try:
            async with self._http.stream(
                "POST", "/inference/v1/generate", content=orjson.dumps({**body, "stream": True})
            ) as answer:
                if answer.status_code != HTTPStatus.OK:
                    _raise_for(answer.status_code, await answer.aread())
                yield _chunks(answer)
        except httpx2.TransportError as error:
            raise ServerLost(repr(error)) from error

    def _require_open(self) -> None:
        if self._http.is_closed:
            raise ServerLost("the connection was given up")

    async def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float | None
    ) -> Any:
        """The answer's content; None if it is not JSON.

        Raises:
            ServerLost: No whole answer came, or the server's engine failed.
            ServerRefuses: It answered with a status of the 4xx.
        """
        self._require_open()
        try:
            answer = await self._http.request(
                method,
                path,
                content=None if body is None else orjson.dumps(body),
                timeout=httpx2.Timeout(seconds, connect=CONNECT_SECONDS),
            )
        except httpx2.TransportError as error:
            raise ServerLost(repr(error)) from error
        if answer.status_code != HTTPStatus.OK:
            _raise_for(answer.status_code, answer.content)
        try:
            return orjson.loads(answer.content)
        except orjson.JSONDecodeError:
            return None


async def _chunks(answer: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream up to its end.

    Raises:
        ServerLost: It ended early, or with an error of the engine.
    """
    async for line in answer.aiter_lines():
        if not line.startswith("data:"):
            continue
        text = line[5:].strip()
        if text == "[DONE]":
            return
        try:
            chunk = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise WrongAnswer(f"a chunk is not JSON: {text[:MAX_REASON_CHARACTERS]}") from error
        if not isinstance(chunk, dict) or "error" in chunk:
            raise ServerLost(text[:MAX_REASON_CHARACTERS])
        yield chunk
    raise ServerLost("the stream ended early")


def _raise_for(status: int, content: bytes) -> None:
    text = content[:MAX_REASON_CHARACTERS].decode(errors="replace")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise ServerLost(f"status {status}: {text}")
    raise ServerRefuses(status, text)
