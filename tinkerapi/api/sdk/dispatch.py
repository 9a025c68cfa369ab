"""One address, two dialects: a path that both know goes to the view of whoever asks.

The rule is ``is_sdk_dialect``. A client that does not name itself is told by its body, and
the body is read and parsed for that only where the bytes could hold the SDK's ``seq_id``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import orjson
from django.core.exceptions import RequestDataTooBig
from django.http import HttpRequest, HttpResponseBase

from tinkerapi.api.body_limit import HOLDS_SEQ_ID
from tinkerapi.api.dialect import SEQ_ID_WORD, is_sdk_dialect


def by_dialect(quick_reference: Callable[..., Any], sdk: Callable[..., Any]) -> Callable[..., Any]:
    """A view that is the SDK's for the SDK and the quick reference's for everybody else.

    To whatever reads the route table it is the quick reference's, which is documented.
    """

    @wraps(quick_reference)
    async def view(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        chosen = sdk if speaks_sdk(request) else quick_reference
        return cast(HttpResponseBase, await chosen(request, *args, **kwargs))

    return view


def speaks_sdk(request: HttpRequest) -> bool:
    """Whether the official SDK sent this, by its headers or by its body."""
    if is_sdk_dialect(request):
        return True
    scope = getattr(request, "scope", {})
    if not scope.get(HOLDS_SEQ_ID, True):
        return False
    try:
        body = request.body
    except (RequestDataTooBig, OSError):
        return False  # the quick reference's view says what is wrong with it
    if SEQ_ID_WORD not in body:
        return False
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return isinstance(value, dict) and is_sdk_dialect(request, value)
