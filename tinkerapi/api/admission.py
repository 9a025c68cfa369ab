"""Decides from path and headers whether a request may send its body, and how large."""

from __future__ import annotations

import io
from collections.abc import MutableMapping
from typing import Any

from django.core.handlers.asgi import ASGIRequest, get_script_prefix
from django.http import HttpRequest, HttpResponseBase
from django.urls import Resolver404, resolve, set_script_prefix

from tinkerapi.api.async_view import CONTROL_BODY_BYTES, AsyncAPIView
from tinkerapi.api.bodies.limit import SMALL_BODY_BYTES, Admitted, too_large
from tinkerapi.api.dispatch import view_by_headers
from tinkerapi.api.errors import bad_request, page_not_found
from tinkerapi.page_addresses import is_page


async def admit(scope: MutableMapping[str, Any]) -> HttpResponseBase | Admitted:
    """The sender and its size limit, or the answer that refuses this request's body unread."""
    if is_page(scope["path"]):
        return Admitted(CONTROL_BODY_BYTES)  # forms; the pages check permissions themselves
    set_script_prefix(get_script_prefix(scope))
    try:
        request = ASGIRequest(scope, io.BytesIO())
    except UnicodeDecodeError as error:
        return bad_request(HttpRequest(), error)
    try:
        match = resolve(request.path_info)
    except Resolver404 as error:
        return page_not_found(request, error)
    callback: Any = view_by_headers(match.func, request)
    view_class = getattr(callback, "view_class", None)
    if view_class is None or not issubclass(view_class, AsyncAPIView):
        return too_large(SMALL_BODY_BYTES)  # the view reads no body
    view: AsyncAPIView = view_class(**callback.view_initkwargs)
    view.setup(request, *match.args, **match.kwargs)
    refusal = await view.admit(request, *match.args, **match.kwargs)
    if refusal is not None:
        return refusal
    return Admitted(
        view.max_body_bytes(), view.request.user.pk, view.refuse_too_large, view.is_numbered
    )
