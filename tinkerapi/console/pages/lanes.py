"""Lanes in the admin: ordered futures and their progress."""

from __future__ import annotations

from django.contrib import admin
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import (
    AutocompleteSelectFilter,
    BooleanRadioFilter,
)

from futures.models import Future, Lane
from futures.overview import lane_waiting
from tinkerapi.console.kit.console_admin import ConsoleAdmin
from tinkerapi.console.kit.display import link, list_link


@admin.register(Lane)
class LaneAdmin(ConsoleAdmin):
    """Lanes and their progress."""

    list_display = ("id", "owner_link", "queue", "ordered", "next_seq_id", "last_seq_id", "futures")
    list_filter = (("owner", AutocompleteSelectFilter), ("ordered", BooleanRadioFilter))
    list_filter_submit = True
    list_select_related = ("owner",)
    search_fields = ("id__startswith",)
    search_help_text = "Beginning of a lane's id"
    sortable_by = ("id",)
    ordering = ("id",)
    fieldsets = (
        (
            None,
            {
                "fields": (
                    ("id", "owner_link"),
                    ("queue", "ordered"),
                    ("next_seq_id", "last_seq_id"),
                    ("waiting", "futures"),
                )
            },
        ),
    )

    @admin.display(description="Owner")
    def owner_link(self, lane: Lane) -> SafeString | None:
        return link(lane.owner)

    @admin.display(description="Futures")
    def futures(self, lane: Lane) -> SafeString:
        return list_link(Future, "futures of this lane", lane__id__exact=lane.pk)

    @admin.display(description="Waiting")
    def waiting(self, lane: Lane) -> int:
        return lane_waiting(lane.pk)
