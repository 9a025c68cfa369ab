"""Bodies are read only if they may be, no further than a limit, and only while they keep coming.

Django reads a request's whole body into a temporary file before any view sees the request, so a
view cannot protect memory or disk. This stands in front of Django. A small body may come with its
headers. Before a larger one, or one of unknown length, the view says by the headers alone whether
it wants it: who asks is settled by then (``admission``), and has a few of them here at a time
(``body_turns``). Every body has to arrive in time.

It also notes, as the body passes, how large it is, and whether it could hold the SDK's number: to
look for that later would bring the bodies of all clients into memory at once, before their turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

from django.conf import settings
from django.http import HttpResponseBase

from tinkerapi.api.bodies.parsers import too_large_sentence
from tinkerapi.api.bodies.turns import body_turn, held_turn
from tinkerapi.api.dialect import SEQ_ID_WORD
from tinkerapi.api.errors import BodyTooLarge, error_response

HOLDS_SEQ_ID = "tinkerapi.holds_seq_id"
"""In a request's scope: whether its body holds ``SEQ_ID_WORD``, once all of it has arrived."""

BODY_BYTES = "tinkerapi.body_bytes"
"""In a request's scope: how much of its body has arrived."""

SMALL_BODY_BYTES = 64 * 1024
"""A body that is read whoever sends it: to ask first would cost more than it does."""

PAST_ANSWER_SECONDS = 5.0
"""How long the rest of a refused body is thrown away. A client that is still sending it when the
connection closes loses the answer, and most would send everything again."""

Scope = MutableMapping[str, Any]
Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class Admitted(NamedTuple):
    """A request whose body may come."""

    max_bytes: int
    owner: object = None
    """Whose it is; None if nobody's, which only small ones are."""


Admit = Callable[[Scope], Awaitable[HttpResponseBase | Admitted]]
"""Whether a request's body may come, or the answer that refuses it unread."""

_GONE: Message = {"type": "http.disconnect"}


def limit_body(application: Application, admit: Admit) -> Application:
    """The application, which sees no body that is refused, too large or too slow."""

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        length = _declared_length(scope)
        if length is not None and length <= SMALL_BODY_BYTES:
            await _pass_on(application, scope, receive, send, max_bytes=SMALL_BODY_BYTES)
            return
        admitted = await admit(scope)
        if isinstance(admitted, HttpResponseBase):
            await _refuse(admitted, receive, send)
        elif (length or 0) > admitted.max_bytes:
            await _refuse(too_large(admitted.max_bytes), receive, send)
        elif admitted.owner is None:
            await _pass_on(application, scope, receive, send, max_bytes=admitted.max_bytes)
        else:
            with held_turn(scope, await body_turn(admitted.owner)):
                await _pass_on(application, scope, receive, send, max_bytes=admitted.max_bytes)

    return limited


async def _pass_on(
    application: Application, scope: Scope, receive: Receive, send: Send, *, max_bytes: int
) -> None:
    body = Body(scope, receive, max_bytes)
    await application(scope, body.receive, send)
    if body.refusal is not None:
        await _answer(body.refusal, send)


class Body:
    """A body on its way to the application."""

    def __init__(self, scope: Scope, receive: Receive, limit: int) -> None:
        self._scope = scope
        self._receive = receive
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + settings.BODY_SECONDS
        self._is_whole = False
        self._end = b""
        self.refusal: HttpResponseBase | None = None
        """Set once the body is refused. To Django the client has gone: it drops what it has and
        answers nothing."""
        scope[HOLDS_SEQ_ID], scope[BODY_BYTES] = False, 0

    async def receive(self) -> Message:
        """The next message of the client, for the application."""
        if self._is_whole or self.refusal is not None:
            return await self._receive() if self._is_whole else _GONE
        idle_end = self._loop.time() + settings.BODY_IDLE_SECONDS
        try:
            async with asyncio.timeout_at(min(idle_end, self._deadline)):
                message = await self._receive()
        except TimeoutError:
            self.refusal = _too_slow()
            return _GONE
        if message["type"] != "http.request":  # it has gone, or what it sent is no HTTP
            self.refusal = _cut_off()
            return _GONE
        self._pass(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        return message if self.refusal is None else _GONE

    def _pass(self, piece: bytes) -> None:
        self._scope[BODY_BYTES] += len(piece)
        if self._scope[BODY_BYTES] > self._limit:
            self.refusal = too_large(self._limit)
        word = len(SEQ_ID_WORD)
        if SEQ_ID_WORD in piece or SEQ_ID_WORD in self._end + piece[:word]:
            self._scope[HOLDS_SEQ_ID] = True
        self._end = (self._end + piece[-word:])[-word:]


def _declared_length(scope: Scope) -> int | None:
    """The body's bytes; None if only its end will tell."""
    length = 0
    for name, value in scope["headers"]:
        if name == b"transfer-encoding":
            return None
        if name == b"content-length":
            length = int(value) if value.isdigit() else 0
    return length


async def _refuse(response: HttpResponseBase, receive: Receive, send: Send) -> None:
    """Answer at once, and let the body, of which nothing was read, come to an end."""
    await _start(response, send)
    await send({"type": "http.response.body", "body": _content(response), "more_body": True})
    thrown_away = 0
    try:
        async with asyncio.timeout(PAST_ANSWER_SECONDS):
            while thrown_away <= settings.MAX_BODY_BYTES:
                message = await receive()
                thrown_away += len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b""})


async def _answer(response: HttpResponseBase, send: Send) -> None:
    await _start(response, send)
    await send({"type": "http.response.body", "body": _content(response)})


async def _start(response: HttpResponseBase, send: Send) -> None:
    headers = [(name.encode(), value.encode()) for name, value in response.items()]
    # The rest of the body is still on its way, so the connection cannot be used again.
    headers.append((b"connection", b"close"))
    status = response.status_code
    await send({"type": "http.response.start", "status": status, "headers": headers})


def _content(response: HttpResponseBase) -> bytes:
    return bytes(getattr(response, "content", b""))


def too_large(limit: int) -> HttpResponseBase:
    """413, with the limit."""
    return error_response(413, too_large_sentence(limit), error_code=BodyTooLarge.__name__)


def _too_slow() -> HttpResponseBase:
    return error_response(
        408,
        f"The body did not arrive in time: it may take {settings.BODY_SECONDS} s, and stand still "
        f"for {settings.BODY_IDLE_SECONDS} s (TINKERAPI_BODY_SECONDS, "
        "TINKERAPI_BODY_IDLE_SECONDS).",
        error_code="BodyTooSlow",
    )


def _cut_off() -> HttpResponseBase:
    return error_response(
        400,
        "The body ended before it was whole, or its chunks are not in HTTP's form.",
        error_code="BadRequest",
    )
