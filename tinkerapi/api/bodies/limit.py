"""Reads a body only if its sender may send it, up to a limit, and only while it keeps arriving.

Django reads a request's whole body into a temporary file before any view sees the request, so a
view cannot protect memory or disk. This runs before Django. A small body is read without
a check. Before a larger one, or one of unknown length, the view decides by the headers alone
whether it accepts the body: the sender is then authenticated (``admission``), and may send a few at
a time (``body_turns``). Every body must arrive in time.

It also records, while the body arrives, its size and whether it could contain the SDK's number:
searching for that later would load the bodies of all clients into memory at once, before their
turn.
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
"""In a request's scope: whether its body contains ``SEQ_ID_WORD``, once all of it has arrived."""

BODY_BYTES = "tinkerapi.body_bytes"
"""In a request's scope: the bytes of its body that have arrived."""

SMALL_BODY_BYTES = 64 * 1024
"""A body up to this size is read from any sender: a check first would cost more."""

HEAD_BYTES = 256 * 1024
"""The bytes that are kept of a body that is too large, to read its number there. A block of zstd
takes half of it."""

PAST_ANSWER_SECONDS = 5.0
"""How long the rest of a refused body is discarded. A client that is still sending it when the
connection closes loses the answer, and most would send everything again."""

Scope = MutableMapping[str, Any]
Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


Refuse = Callable[[bytes], Awaitable[HttpResponseBase]]
"""The answer to a body that is too large, of which this is the beginning."""


class Admitted(NamedTuple):
    """A request whose body may be sent."""

    max_bytes: int
    owner: object = None
    """The user that it belongs to; None only for small ones."""
    refuse: Refuse | None = None
    """The answer if the body is too large; None: ``too_large``."""
    reads_head: bool = False
    """Whether that answer depends on the beginning of the body, up to ``HEAD_BYTES``."""


Admit = Callable[[Scope], Awaitable[HttpResponseBase | Admitted]]
"""Whether a request may send its body, or the answer that refuses it unread."""

_GONE: Message = {"type": "http.disconnect"}


def limit_body(application: Application, admit: Admit) -> Application:
    """The application, which never receives a body that is refused, too large or too slow."""

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        length = _declared_length(scope)
        if length is not None and length <= SMALL_BODY_BYTES:
            await _pass_on(application, scope, receive, send, Admitted(SMALL_BODY_BYTES))
            return
        admitted = await admit(scope)
        if isinstance(admitted, HttpResponseBase):
            await _refuse(admitted, receive, send)
        elif (length or 0) > admitted.max_bytes:
            head = await _head(receive) if admitted.reads_head else b""
            await _refuse(await _too_large(admitted, head), receive, send)
        elif admitted.owner is None:
            await _pass_on(application, scope, receive, send, admitted)
        else:
            with held_turn(scope, await body_turn(admitted.owner)):
                await _pass_on(application, scope, receive, send, admitted)

    return limited


async def _pass_on(
    application: Application, scope: Scope, receive: Receive, send: Send, admitted: Admitted
) -> None:
    body = Body(scope, receive, admitted)
    await application(scope, body.receive, send)
    if body.refusal is not None:
        await _answer(body.refusal, send)


class Body:
    """A body on its way to the application."""

    def __init__(self, scope: Scope, receive: Receive, admitted: Admitted) -> None:
        self._scope = scope
        self._receive = receive
        self._admitted = admitted
        self._head = b""
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + settings.BODY_SECONDS
        self._is_whole = False
        self._end = b""
        self.refusal: HttpResponseBase | None = None
        """Set once the body is refused. Django is told that the client has disconnected: it drops
        the request and does not answer."""
        scope[HOLDS_SEQ_ID], scope[BODY_BYTES] = False, 0

    async def receive(self) -> Message:
        """The next message of the client, for the application."""
        if self._is_whole:
            return await self._receive()
        message = await self._arriving()
        if self.refusal is not None:
            return _GONE
        piece = message.get("body", b"")
        self._scope[BODY_BYTES] += len(piece)
        if self._admitted.reads_head and len(self._head) < HEAD_BYTES:
            self._head += piece[: HEAD_BYTES - len(self._head)]
        if self._scope[BODY_BYTES] > self._admitted.max_bytes:
            self.refusal = await _too_large(self._admitted, self._head)
            return _GONE
        word = len(SEQ_ID_WORD)
        if SEQ_ID_WORD in piece or SEQ_ID_WORD in self._end + piece[:word]:
            self._scope[HOLDS_SEQ_ID] = True
        self._end = (self._end + piece[-word:])[-word:]
        self._is_whole = not message.get("more_body", False)
        return message

    async def _arriving(self) -> Message:
        """The next part of the body, if it arrives in time; otherwise the body is refused."""
        if self.refusal is not None:
            return _GONE
        idle_end = self._loop.time() + settings.BODY_IDLE_SECONDS
        try:
            async with asyncio.timeout_at(min(idle_end, self._deadline)):
                message = await self._receive()
        except TimeoutError:
            self.refusal = _too_slow()
            return _GONE
        if message["type"] != "http.request":  # the client has gone, or has not sent valid HTTP
            self.refusal = _cut_off()
        return message


def _declared_length(scope: Scope) -> int | None:
    """The declared bytes of the body; None if it is chunked."""
    length = 0
    for name, value in scope["headers"]:
        if name == b"transfer-encoding":
            return None
        if name == b"content-length":
            length = int(value) if value.isdigit() else 0
    return length


async def _head(receive: Receive) -> bytes:
    """The beginning of a body, as far as it arrives in time."""
    head = b""
    try:
        async with asyncio.timeout(settings.BODY_IDLE_SECONDS):
            while len(head) < HEAD_BYTES:
                message = await receive()
                head += message.get("body", b"")
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    return head[:HEAD_BYTES]


async def _too_large(admitted: Admitted, head: bytes) -> HttpResponseBase:
    if admitted.refuse is None:
        return too_large(admitted.max_bytes)
    return await admitted.refuse(head)


async def _refuse(response: HttpResponseBase, receive: Receive, send: Send) -> None:
    """Answer at once, and discard the unread body until it ends."""
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
    # The rest of the body is still arriving, so the connection cannot be used again.
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
        f"The body did not arrive in time: it may take {settings.BODY_SECONDS} s, and pause "
        f"for {settings.BODY_IDLE_SECONDS} s (TINKERAPI_BODY_SECONDS, "
        "TINKERAPI_BODY_IDLE_SECONDS).",
        error_code="BodyTooSlow",
    )


def _cut_off() -> HttpResponseBase:
    return error_response(
        400,
        "The body is incomplete, or its chunks are not valid HTTP.",
        error_code="BadRequest",
    )
