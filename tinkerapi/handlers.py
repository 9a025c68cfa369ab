"""Django twice in one process: whole for pages in a browser, bare for the API.

Sessions, CSRF, messages and the rest serve the admin. In front of an API request they cost
more than the API itself (about twelve visits to a thread, 1.5 to 2 ms of CPU, of which the
view needs 0.6), so API requests go round them. What the API needs of them it does itself:
``AsyncAPIView`` checks the Host header, ``JSONResponse`` sets its headers.
"""

from __future__ import annotations

from django.core.asgi import get_asgi_application
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.exception import convert_exception_to_response

from tinkerapi.api.body_limit import Application, Receive, Scope, Send, limit_body
from tinkerapi.pages import is_page


class ApiHandler(ASGIHandler):
    """Django's request handling without middleware."""

    def load_middleware(self, is_async: bool = False) -> None:
        """What Django's own does when no middleware is installed."""
        self._view_middleware: list[object] = []
        self._template_response_middleware: list[object] = []
        self._exception_middleware: list[object] = []
        respond = self._get_response_async  # type: ignore[attr-defined]  # the stubs leave it out
        self._middleware_chain = convert_exception_to_response(respond)


def build_application() -> Application:
    """The ASGI application: both handlers behind the body limit."""
    pages = get_asgi_application()
    api = ApiHandler()

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        handler = pages if is_page(scope.get("path", "")) else api
        await handler(scope, receive, send)

    return limit_body(route)
