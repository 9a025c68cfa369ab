"""Query parameters: read, checked and refused by name, as body fields are."""

from __future__ import annotations

from datetime import date, datetime

from django.utils.dateparse import parse_datetime
from rest_framework.request import Request

from tinkerapi.api.fields.field import Choice, Integer, Text
from tinkerapi.api.fields.refusals import refuse

MAX_PAGE = 1000
"""The largest page of the CLI."""

YEARS = range(1970, 9001)
"""Allowed years: with offsets and spans added, dates stay valid."""

_SCOPE = Choice(description="", choices=("owned", "accessible"))
_OFFSET = Integer(description="", maximum=2**31 - 1)
_TEXT = Text(description="")


def query_page(request: Request, *, limit: int) -> dict[str, int]:
    """``offset`` and ``limit``; ``limit`` has this default and is cut to the largest page.

    Raises:
        InvalidRequest: Not integers. (400)
    """
    return {
        "offset": _integer(request, "offset", 0),
        "limit": min(_integer(request, "limit", limit), MAX_PAGE),
    }


def check_access_scope(request: Request) -> None:
    """Refuse an unknown scope. All scopes list the caller's own objects, since lists contain no
    others.

    Raises:
        InvalidRequest: (400)
    """
    _SCOPE.check(request.query_params.get("access_scope", "owned"), "access_scope")


def query_text(request: Request, name: str) -> str | None:
    """A text, or None if absent.

    Raises:
        InvalidRequest: (400)
    """
    value = request.query_params.get(name)
    return None if not value else _TEXT.check(value, name)


def query_day(request: Request, name: str) -> date | None:
    """A date, or None if absent.

    Raises:
        InvalidRequest: (400)
    """
    value = query_text(request, name)
    if value is None:
        return None
    try:
        day = date.fromisoformat(value)
    except ValueError:
        raise refuse(name, "a date such as 2026-01-01", value) from None
    if day.year not in YEARS:
        raise refuse(name, f"a date of the years {YEARS[0]} to {YEARS[-1]}", value)
    return day


def check_moment(value: str, where: str) -> datetime:
    """A time with its UTC offset.

    Raises:
        InvalidRequest: (400)
    """
    try:
        moment = parse_datetime(value)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise refuse(where, "a time with its offset, such as 2026-01-01T12:00:00Z", value)
    if moment.year not in YEARS:
        raise refuse(where, f"a time of the years {YEARS[0]} to {YEARS[-1]}", value)
    return moment


def query_moment(request: Request, name: str) -> datetime:
    """A time with its UTC offset.

    Raises:
        InvalidRequest: (400)
    """
    value = request.query_params.get(name, "")
    # A "+" that was not encoded arrives as a space.
    return check_moment(value.replace(" ", "+") if "T" in value else value, name)


def _integer(request: Request, name: str, default: int) -> int:
    value = request.query_params.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdecimal() and len(value) < 20):
        raise refuse(name, "a whole number", value)
    return _OFFSET.check(int(value), name)
