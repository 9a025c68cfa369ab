"""Refuse a large body before it arrives.

Django reads a request's whole body into a temporary file before any view sees the request,
so a view cannot protect memory or disk. This stands in front of Django: by Content-Length a
body is refused unread, and without one it is cut off at the limit.

It also notes, as the body passes, whether it could hold the SDK's number: to look for that later
would bring the bodies of all clients into memory at once, before their turn.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from django.conf import settings

from tinkerapi.api.dialect import SEQ_ID_WORD
from tinkerapi.api.errors import BodyTooLarge, error_response
from tinkerapi.api.parsers import too_large_sentence

HOLDS_SEQ_ID = "tinkerapi.holds_seq_id"
"""In a request's scope: whether its body holds ``SEQ_ID_WORD``, once all of it has arrived."""

Scope = dict[str, Any]
Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


def limit_body(application: Application) -> Application:
    """The application with bodies of at most ``settings.MAX_BODY_BYTES``; others answer 413."""

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await application(scope, receive, send)
            return
        if _declared_length(scope) > settings.MAX_BODY_BYTES:
            await _refuse(send)
            return
        received, end, word = 0, b"", len(SEQ_ID_WORD)
        scope[HOLDS_SEQ_ID] = False

        async def counted() -> Message:
            nonlocal received, end
            message = await receive()
            body = message.get("body", b"")
            received += len(body)
            if SEQ_ID_WORD in body or SEQ_ID_WORD in end + body[:word]:
                scope[HOLDS_SEQ_ID] = True
            end = (end + body[-word:])[-word:]
            # To Django the client has gone: it drops the body and answers nothing.
            return message if received <= settings.MAX_BODY_BYTES else {"type": "http.disconnect"}

        await application(scope, counted, send)
        if received > settings.MAX_BODY_BYTES:
            await _refuse(send)

    return limited


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0


async def _refuse(send: Send) -> None:
    response = error_response(413, too_large_sentence(), error_code=BodyTooLarge.__name__)
    headers = [(name.encode(), value.encode()) for name, value in response.items()]
    # The rest of the body is still on its way, so the connection cannot be used again.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": response.content})
