"""A DRF view that waits without holding a thread or a database connection.

The synchronous part of a request (authentication, parsing, one service call) runs in one of
a few threads (``threads``). If the handler returns an awaitable, it is awaited on the event
loop after the thread was released: thousands of requests may wait for their futures on four
threads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, NoReturn, cast

from django.conf import settings
from django.db import connection
from django.http import HttpRequest, HttpResponseBase
from rest_framework.exceptions import MethodNotAllowed
from rest_framework.request import Request
from rest_framework.views import APIView

from futures.circuit_breaker import circuit_breaker
from tinkerapi.api.bodies.compression import HEADER_BYTES, claimed_size
from tinkerapi.api.bodies.limit import BODY_BYTES
from tinkerapi.api.bodies.parsers import declared_length, too_large_sentence
from tinkerapi.api.bodies.turns import let_go_of_body
from tinkerapi.api.errors import BodyTooLarge
from tinkerapi.api.fields.refusals import check_characters
from tinkerapi.api.threads import in_bulk_thread, in_database_thread, in_storage_thread
from training.storage.chosen import storage

CONTROL_BODY_BYTES = 256 * 1024
"""The largest body of a view that takes no data: ids, settings, a session's metadata."""

BULK_BYTES = 256 * 1024
"""Bodies of at least this size are decoded in the threads for large bodies."""


_CALLER = "tinkerapi.caller"
"""In a request's scope: the ``_Caller``, if it was authenticated before the body was read."""


class _Caller(NamedTuple):
    """The authenticated sender."""

    found_by: list[Any]
    """The authentication classes that identified it."""
    user: Any
    auth: Any


def _check_address(request: Request, path: Mapping[str, Any]) -> None:
    """Refuse, by name, a part of the path or the query whose value cannot exist.

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
    """DRF's dispatch in two parts: handlers run in a database thread, and an awaitable that
    they return runs on the event loop.

    A handler is a plain method, so it may use the ORM; an ``async def`` handler works too and
    runs on the loop as a whole.
    """

    view_is_async = True

    takes_data: ClassVar[bool] = False
    """Whether a body may contain training data or prompts, up to the limit of the settings."""

    uses_storage: ClassVar[bool] = False
    """Whether the handler reads or writes files of the storage, which may be slow."""

    is_numbered: ClassVar[bool] = False
    """Whether the beginning of a refused body is read, because it may contain the request's number
    in a lane."""

    def max_body_bytes(self) -> int:
        """The largest body that this view accepts, decompressed."""
        limit: int = settings.MAX_BODY_BYTES
        return limit if self.takes_data else min(limit, CONTROL_BODY_BYTES)

    async def admit(
        self, request: HttpRequest, *args: Any, **kwargs: Any
    ) -> HttpResponseBase | None:
        """The answer that refuses this request by its headers alone; None if it is accepted.

        Called before a body of any size is read. It checks the sender and the method.
        """
        self._prepare(request, *args, **kwargs)
        try:
            request.get_host()
            await in_database_thread(self._begin, self.request)
            self._handler(self.request)
        except Exception as exc:
            response = self.handle_exception(exc)
            return self.finalize_response(self.request, response, *args, **kwargs)
        asker = _Caller(list(self.authentication_classes), self.request.user, self.request.auth)
        getattr(request, "scope", {})[_CALLER] = asker
        return None

    async def refuse_too_large(self, head: bytes) -> HttpResponseBase:
        """The answer to an admitted request whose body is larger than ``max_body_bytes``.

        Args:
            head: The body's beginning, as sent; empty unless ``is_numbered``.
        """
        try:
            response: Any = await in_database_thread(self.too_large_body, self.request, head)
        except Exception as exc:
            response = self.handle_exception(exc)
        return self.finalize_response(self.request, response, *self.args, **self.kwargs)

    def too_large_body(self, request: Request, head: bytes) -> HttpResponseBase:
        """What ``refuse_too_large`` answers.

        Raises:
            BodyTooLarge: (413)
        """
        raise BodyTooLarge(too_large_sentence(self.max_body_bytes()))

    # DRF's own is synchronous; Django awaits this one because view_is_async says so.
    async def dispatch(  # type: ignore[override]
        self, request: HttpRequest, *args: Any, **kwargs: Any
    ) -> HttpResponseBase:
        drf_request = self._prepare(request, *args, **kwargs)
        is_known = self._recall(request, drf_request)
        try:
            request.get_host()  # raises for a host that is not in ALLOWED_HOSTS
            waits_for_storage = self.uses_storage and storage().is_remote
            if waits_for_storage or is_bulky(request):
                # The sender is known before decoding, and decodes one body at a time.
                if not is_known:
                    await in_database_thread(self._begin, drf_request)
                in_turn = in_storage_thread if waits_for_storage else in_bulk_thread
                owner = getattr(drf_request.user, "pk", None) or request.path
                response = await in_turn(owner, self._handle, drf_request)
            else:
                response = await in_database_thread(self._handle, drf_request)
            if inspect.isawaitable(response):
                let_go_of_body(request)
                response = await response
        except Exception as exc:
            response = self.handle_exception(exc)
        self.response = self.finalize_response(drf_request, response, *args, **kwargs)
        return self.response

    def _prepare(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Request:
        """The first part of DRF's dispatch."""
        self.args, self.kwargs = args, kwargs
        self.headers = self.default_response_headers
        self.request = self.initialize_request(request, *args, **kwargs)
        return self.request

    def _recall(self, request: HttpRequest, drf_request: Request) -> bool:
        """Whether ``admit`` authenticated the request before its body was read. Then that result is
        used, and no key is looked up a second time."""
        caller = getattr(request, "scope", {}).get(_CALLER)
        if caller is None or caller.found_by != list(self.authentication_classes):
            return False
        drf_request.user, drf_request.auth = caller.user, caller.auth
        return True

    def _handle(self, request: Request) -> Any:
        self._begin(request)
        return self._run_handler(request)

    def _begin(self, request: Request) -> None:
        """Authenticate the request and check its permissions."""
        if self.authentication_classes and connection.connection is None:
            circuit_breaker.wait_out(connection.ensure_connection)
        self.initial(request, *self.args, **self.kwargs)
        _check_address(request, self.kwargs)

    def _run_handler(self, request: Request) -> Any:
        return self._handler(request)(request, *self.args, **self.kwargs)

    def _handler(self, request: Request) -> Callable[..., Any]:
        """The view's method for the HTTP method.

        Raises:
            MethodNotAllowed: There is none. (405)
        """
        method = (request.method or "").lower()
        if method in self.http_method_names and (handler := getattr(self, method, None)):
            return cast(Callable[..., Any], handler)
        self.http_method_not_allowed(request, *self.args, **self.kwargs)

    def http_method_not_allowed(
        self, request: HttpRequest | Request, *args: Any, **kwargs: Any
    ) -> NoReturn:
        method = request.method or ""
        allowed = " or ".join(self.allowed_methods)
        raise MethodNotAllowed(method, detail=f"{method} is not allowed here; use {allowed}.")

    def perform_content_negotiation(self, request: Request, force: bool = False) -> Any:
        """No content negotiation: see ``renderers``."""
        return self.get_renderers()[0], "application/json"


def is_bulky(request: HttpRequest) -> bool:
    """Whether the request's body is large, or may be after decompression."""
    arrived = getattr(request, "scope", {}).get(BODY_BYTES)  # a chunked body declares no length
    if (declared_length(request) if arrived is None else arrived) > BULK_BYTES:
        return True
    if "Content-Encoding" not in request.headers:
        return False
    size = claimed_size(request.body[:HEADER_BYTES])
    return size is None or size > BULK_BYTES
