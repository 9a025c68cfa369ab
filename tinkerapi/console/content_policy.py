"""Content-Security-Policy: a browser may load and run only this server's own content
for our pages.

The policy is a second protection besides the escaping of user-defined names: text that becomes
markup by mistake still runs no script and sends nothing elsewhere.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import cast

from asgiref.sync import iscoroutinefunction
from django.http import HttpRequest, HttpResponseBase
from django.utils.decorators import sync_and_async_middleware

GetResponse = Callable[[HttpRequest], HttpResponseBase | Awaitable[HttpResponseBase]]

HEADER = "Content-Security-Policy"

# Styles are inline, in attributes too; the admin theme's images are data URLs.
_EVERYWHERE = (
    "default-src 'none'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; script-src "
)
POLICY = _EVERYWHERE + "'self'"
ADMIN_POLICY = _EVERYWHERE + "'self' 'unsafe-eval'"
"""The admin theme uses Alpine, which compiles the expressions in its templates."""


def policy_for(path: str) -> str:
    """The policy of the page at this path."""
    return ADMIN_POLICY if path.startswith("/admin") else POLICY


@sync_and_async_middleware
def content_policy_middleware(get_response: GetResponse) -> GetResponse:
    """Give every page its policy, unless its view has set one."""
    if iscoroutinefunction(get_response):

        async def answer_async(request: HttpRequest) -> HttpResponseBase:
            response = await cast(Awaitable[HttpResponseBase], get_response(request))
            response.headers.setdefault(HEADER, policy_for(request.path))
            return response

        return answer_async

    def answer(request: HttpRequest) -> HttpResponseBase:
        response = cast(HttpResponseBase, get_response(request))
        response.headers.setdefault(HEADER, policy_for(request.path))
        return response

    return answer
