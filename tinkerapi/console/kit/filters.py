"""Filters of the admin's lists that only need an index."""

from __future__ import annotations

from datetime import datetime, time
from typing import Any

from django.contrib import messages
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.dateparse import parse_date, parse_time
from unfold.contrib.filters.admin import RadioFilter, RangeDateTimeFilter

RECENT_ROWS = 1000
"""Number of newest rows whose kinds are offered as filters."""


class KindFilter(RadioFilter):  # type: ignore[misc]  # unfold has no type information
    """By kind, offering those of the newest rows, without a scan of the whole table."""

    title = "kind"
    parameter_name = "kind"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        newest = model_admin.get_queryset(request).order_by("-created_at")
        kinds = set(newest.values_list("kind", flat=True)[:RECENT_ROWS])
        return [(kind, kind) for kind in sorted(kinds)]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(kind=self.value()) if self.value() else queryset


class MomentFilter(RangeDateTimeFilter):  # type: ignore[misc]  # unfold has no type information
    """Between two moments of the server's time zone; a date without a time is its whole day.

    Unfold's own takes naive times and silently ignores a date without a time.
    """

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        for part, lookup, default in (("from", "gte", time.min), ("to", "lte", time.max)):
            date_text, time_text = (
                str(self.used_parameters.get(f"{self.parameter_name}_{part}_{index}") or "")
                for index in (0, 1)
            )
            if not date_text:
                continue
            try:
                day = parse_date(date_text)
                clock = parse_time(time_text) if time_text else default
            except ValueError:  # well formed, but not a valid date
                day = clock = None
            if day is None or clock is None:
                messages.error(
                    request, f"{self.title}: not a date and a time, so this filter is ignored"
                )
                continue
            moment = timezone.make_aware(datetime.combine(day, clock))
            queryset = queryset.filter(**{f"{self.parameter_name}__{lookup}": moment})
        return queryset
