"""Query parameters: read, checked and refused by name, as body fields are."""

from __future__ import annotations

from datetime import datetime

from django.utils.dateparse import parse_datetime
from rest_framework.request import Request

from tinkerapi.api.fields import Choice, Integer, Text, refuse

MAX_PAGE = 1000
"""What the CLI asks for at most."""

_SCOPE = Choice(description="", choices=("owned", "accessible"))
_OFFSET = Integer(description="", maximum=2**31 - 1)
_TEXT = Text(description="")


def query_page(request: Request, *, limit: int) -> dict[str, int]:
    """``offset`` and ``limit``; the latter has this default, and is cut to the largest page.

    Raises:
        InvalidRequest: Not whole numbers. (400)
    """
    return {
        "offset": _integer(request, "offset", 0),
        "limit": min(_integer(request, "limit", limit), MAX_PAGE),
    }


def check_access_scope(request: Request) -> None:
    """Refuse an unknown scope. Lists hold one's own either way: nothing else is shared in them.

    Raises:
        InvalidRequest: (400)
    """
    _SCOPE.check(request.query_params.get("access_scope", "owned"), "access_scope")


def query_text(request: Request, name: str) -> str | None:
    """A text, or None where there is none.

    Raises:
        InvalidRequest: (400)
    """
    value = request.query_params.get(name)
    return None if not value else _TEXT.check(value, name)


def query_moment(request: Request, name: str) -> datetime:
    """A moment with its offset.

    Raises:
        InvalidRequest: (400)
    """
    value = request.query_params.get(name, "")
    # A "+" that was not encoded arrives as a space.
    try:
        moment = parse_datetime(value.replace(" ", "+") if "T" in value else value)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise refuse(name, "a time such as 2026-01-01T12:00:00Z", value)
    return moment


def _integer(request: Request, name: str, default: int) -> int:
    value = request.query_params.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdecimal() and len(value) < 20):
        raise refuse(name, "a whole number", value)
    return _OFFSET.check(int(value), name)
