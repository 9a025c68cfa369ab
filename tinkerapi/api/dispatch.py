"""One address, two dialects: a shared path goes to the view of the sender's dialect.

The rule is ``is_sdk_dialect``. If the headers do not decide, the body does. It is read and
parsed for that only if its bytes could contain the SDK's ``seq_id``; a large
body is parsed in the threads for large bodies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

from django.core.exceptions import RequestDataTooBig
from django.http import HttpRequest, HttpResponseBase
from rest_framework.exceptions import ParseError

from tinkerapi.api.bodies.limit import BODY_BYTES, HOLDS_SEQ_ID, SMALL_BODY_BYTES
from tinkerapi.api.bodies.parsers import parse_json
from tinkerapi.api.dialect import SEQ_ID, SEQ_ID_WORD, is_sdk_dialect
from tinkerapi.api.threads import in_bulk_thread
from training.errors import LimitExceeded

View = Callable[..., Any]

_DIALECTS = "dialects"


def by_dialect(quick_reference: View, sdk: View) -> View:
    """A view that calls the SDK's view for the SDK and the quick reference's for all others.

    For readers of the route table it is the quick reference's view, which is documented.
    """

    @wraps(quick_reference)
    async def view(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        chosen = sdk if await speaks_sdk(request) else quick_reference
        return cast(HttpResponseBase, await chosen(request, *args, **kwargs))

    setattr(view, _DIALECTS, (quick_reference, sdk))
    return view


def view_by_headers(view: View, request: HttpRequest) -> View:
    """The view that answers if the request's headers decide the dialect, as with large bodies."""
    quick_reference, sdk = getattr(view, _DIALECTS, (view, view))
    return sdk if is_sdk_dialect(request) else quick_reference


async def speaks_sdk(request: HttpRequest) -> bool:
    """Whether the official SDK sent this, by its headers or by its body."""
    if is_sdk_dialect(request):
        return True
    scope = getattr(request, "scope", {})
    if not scope.get(HOLDS_SEQ_ID, True):
        return False
    if scope.get(BODY_BYTES, 0) <= SMALL_BODY_BYTES:
        return _is_numbered(request)
    # The key was checked before the body was read, so the user is known.
    headers = request.headers
    key = headers.get("X-API-Key") or headers.get("Authorization")
    return await in_bulk_thread(key, _is_numbered, request)


def _is_numbered(request: HttpRequest) -> bool:
    """Whether the body decides for the SDK; a wrong body gets the quick reference's error."""
    try:
        body = request.body
        if SEQ_ID_WORD not in body:
            return False
        value = parse_json(body)
    except (RequestDataTooBig, OSError, LimitExceeded, ParseError):
        return False
    return isinstance(value, dict) and SEQ_ID in value
