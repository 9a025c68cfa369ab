"""Django twice in one process: complete for pages in a browser, minimal for the API.

Sessions, CSRF, messages and other middleware serve the admin. For an API request they cost
more than the API itself (about twelve switches to a thread, 1.5 to 2 ms of CPU, of which the
view needs 0.6), so API requests bypass them. The API does the necessary parts itself:
``AsyncAPIView`` checks the Host header, ``JSONResponse`` sets its headers, and the threads of
``async_view`` maintain their connections, which is the purpose of Django's request signals.
"""

from __future__ import annotations

import asyncio
from contextlib import closing
from typing import Any, cast

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.exceptions import RequestAborted
from django.core.handlers.asgi import ASGIHandler, get_script_prefix
from django.core.handlers.exception import convert_exception_to_response
from django.http import HttpRequest
from django.urls import set_script_prefix

from tinkerapi.api.bodies.limit import Application, Receive, Scope, Send, limit_body
from tinkerapi.api.leaving import client_left
from tinkerapi.api.openai.shape import openai_shape
from tinkerapi.page_addresses import is_front_page, is_page


class ApiHandler(ASGIHandler):
    """Django's request handling without middleware, request signals and threads of its own."""

    def load_middleware(self, is_async: bool = False) -> None:
        """The same as Django's without any middleware."""
        self._view_middleware: list[object] = []
        self._template_response_middleware: list[object] = []
        self._exception_middleware: list[object] = []
        respond = self._get_response_async  # type: ignore[attr-defined]  # the stubs leave it out
        self._middleware_chain = convert_exception_to_response(respond)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, or stop when its client disconnects."""
        try:
            body_file = await self.read_body(receive)
        except RequestAborted:
            return
        with closing(body_file):
            set_script_prefix(get_script_prefix(scope))
            request, error = self.create_request(scope, body_file)
            if error is not None:
                await self.send_response(error, send)
                return
            answering = asyncio.ensure_future(self._answer(cast(HttpRequest, request), send))
            gone = asyncio.ensure_future(receive())  # only a disconnect can arrive now
            try:
                await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
                has_left = not answering.done()
            finally:
                answering.cancel()  # no effect once it is done
                gone.cancel()
                await asyncio.wait((answering, gone))
            if has_left:
                await client_left(cast(HttpRequest, request))
            if not answering.cancelled():
                answering.result()  # raises its exception

    async def _answer(self, request: HttpRequest, send: Any) -> None:
        await self.send_response(await self.run_get_response(request), send)


def build_application() -> Application:
    """The ASGI application: both handlers behind the checks of request bodies, and OpenAI's
    error shape around all."""
    pages = get_asgi_application()
    api = ApiHandler()
    # Imported here, because Django must be set up first.
    from tinkerapi.api.admission import admit
    from tinkerapi.api.keyless import is_local_host

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        is_for_people = is_page(path) or is_front_page(path, _header(scope, b"accept"))
        handler = pages if is_for_people else api
        await handler(cast(Any, scope), cast(Any, receive), cast(Any, send))

    limited = openai_shape(limit_body(route, admit))

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # before it is accepted: 403
        elif scope["type"] == "http":
            if settings.TLS and not is_local_host(_header(scope, b"host")):
                scope["scheme"] = "https"  # the scheme that the client used with the proxy
            await limited(scope, receive, send)

    return application


def _header(scope: Scope, name: bytes) -> str:
    values = [value.decode("latin1") for key, value in scope["headers"] if key == name]
    return values[0] if values else ""
