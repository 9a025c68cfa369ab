"""Answers for page addresses with impossible values: never a 500."""

from __future__ import annotations

from django.core.paginator import InvalidPage
from django.http import HttpRequest, HttpResponse
from django.utils.deprecation import MiddlewareMixin

from tinkerapi.api.errors import UNSTORABLE, bad_request, page_not_found


class ImpossiblePageMiddleware(MiddlewareMixin):
    """400 for a value that no column can store, 404 for a page that a list does not have."""

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        if isinstance(exception, UNSTORABLE):
            return bad_request(request, exception)
        if isinstance(exception, InvalidPage):
            return page_not_found(request, exception)
        return None
