"""Numbers in the addresses of pages."""

from __future__ import annotations

from django.http import HttpRequest

MAX_NUMBER = 2**62


def number_of(request: HttpRequest, name: str) -> int | None:
    """A whole number from 0 in the address; None if it is absent or no number."""
    text = request.GET.get(name, "")
    is_number = text.isascii() and text.isdecimal() and len(text) < 20
    return min(int(text), MAX_NUMBER) if is_number else None
