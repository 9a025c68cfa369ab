"""A DRF view whose waiting costs no thread of ours and no database connection.

The synchronous part of a request (authentication, parsing, one service call) runs in one of
a few threads, each of which keeps its own database connection. If the handler returns an
awaitable, that is awaited on the event loop, after the thread was given back: thousands of
requests may wait for their futures on four threads.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

from django.db import Error as DatabaseFailure
from django.db import connection
from django.http import HttpRequest, HttpResponseBase
from rest_framework.exceptions import MethodNotAllowed
from rest_framework.request import Request
from rest_framework.views import APIView

from futures.database import is_lost
from futures.outage import outage
from tinkerapi.api.fields import check_characters

T = TypeVar("T")

DATABASE_THREADS = 4
"""More would wait for Python's lock."""

executor = ThreadPoolExecutor(DATABASE_THREADS, thread_name_prefix="database")


def _with_connection(function: Callable[..., T], *args: Any) -> T:
    """Call it on this thread's connection, and leave that one fit for the next call."""
    raw = connection.connection
    if raw is not None and is_lost(raw):
        connection.close()
    try:
        answer = function(*args)
    except DatabaseFailure:
        connection.close()  # it may be what failed
        raise
    if connection.connection is not None:
        outage.is_over()
    return answer


async def in_database_thread(function: Callable[..., T], *args: Any) -> T:
    """Run a function that uses the database."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(executor, _with_connection, function, *args)


def _check_address(request: Request, path: Mapping[str, Any]) -> None:
    """Refuse, by its name, a part of the path or the query that names what cannot exist.

    Raises:
        InvalidRequest: (400)
    """
    for name, value in path.items():
        check_characters(value, name)
    for name, values in request.query_params.lists():
        check_characters(name, "query")
        for value in values:
            check_characters(value, name)


class AsyncAPIView(APIView):
    """DRF's dispatch in two parts: handlers run in a database thread, and what they return
    to be awaited runs on the event loop.

    A handler is a plain method, so it may use the ORM; an ``async def`` handler works too and
    runs on the loop as a whole.
    """

    view_is_async = True

    # DRF's own is synchronous; Django awaits this one because view_is_async says so.
    async def dispatch(  # type: ignore[override]
        self, request: HttpRequest, *args: Any, **kwargs: Any
    ) -> HttpResponseBase:
        self.args, self.kwargs = args, kwargs
        self.headers = self.default_response_headers
        self.request = drf_request = self.initialize_request(request, *args, **kwargs)
        try:
            request.get_host()  # raises for a host that is not in ALLOWED_HOSTS
            response = await in_database_thread(self._handle, drf_request)
            if inspect.isawaitable(response):
                # The wait may be long and the body large; it was read, and nobody reads it again.
                vars(request).pop("_body", None)
                response = await response
        except Exception as exc:
            response = self.handle_exception(exc)
        self.response = self.finalize_response(drf_request, response, *args, **kwargs)
        return self.response

    def _handle(self, request: Request) -> Any:
        # Who asks is a question for the database.
        if self.authentication_classes and connection.connection is None:
            outage.wait_out(connection.ensure_connection)
        self.initial(request, *self.args, **self.kwargs)
        _check_address(request, self.kwargs)
        method = (request.method or "").lower()
        handler = self.http_method_not_allowed
        if method in self.http_method_names:
            handler = getattr(self, method, handler)
        return handler(request, *self.args, **self.kwargs)

    def http_method_not_allowed(
        self, request: HttpRequest | Request, *args: Any, **kwargs: Any
    ) -> NoReturn:
        method = request.method or ""
        allowed = " or ".join(self.allowed_methods)
        raise MethodNotAllowed(method, detail=f"{method} is not allowed here; use {allowed}.")

    def perform_content_negotiation(self, request: Request, force: bool = False) -> Any:
        """Nothing is negotiated: see ``renderers``."""
        return self.get_renderers()[0], "application/json"
