"""Every endpoint by group, read from the URL conf so that the list cannot drift."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from django.urls import URLPattern, URLResolver, get_resolver

METHODS = ("get", "post", "put", "delete")


@cache
def endpoints() -> dict[str, list[dict[str, str]]]:
    """Group to method, path and summary of each of its endpoints, in the order of the routes.

    A view without a ``group`` is no endpoint: the admin's pages, and redirects.
    """
    groups: dict[str, list[dict[str, str]]] = {}
    for path, callback in _routes(get_resolver()):
        view = getattr(callback, "view_class", None)
        initkwargs = getattr(callback, "view_initkwargs", {})
        group = initkwargs.get("group") or getattr(view, "group", None)
        if view is None or group is None:
            continue
        summary = (view.__doc__ or "").partition("\n")[0]
        if initkwargs.get("waits") is False:
            summary += " (async)"
        groups.setdefault(group, []).extend(
            {"method": method.upper(), "path": path, "summary": summary}
            for method in METHODS
            if hasattr(view, method) and method in view.http_method_names
        )
    return groups


def _routes(resolver: URLResolver, prefix: str = "/") -> Iterator[tuple[str, Any]]:
    for pattern in resolver.url_patterns:
        path = f"{prefix}{pattern.pattern}"
        if isinstance(pattern, URLResolver):
            yield from _routes(pattern, path)
        elif isinstance(pattern, URLPattern):
            yield path, pattern.callback
