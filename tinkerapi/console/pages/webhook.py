"""Events for the webhook's receiver in the admin: read-only, for superusers."""

from __future__ import annotations

from django.contrib import admin
from django.db.models import Model
from django.http import HttpRequest
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import ChoicesCheckboxFilter

from tinkerapi.console.kit.console_admin import ConsoleAdmin
from tinkerapi.console.kit.display import copyable, moment, one_line, state_label
from tinkerapi.models import Delivery


@admin.register(Delivery)
class DeliveryAdmin(ConsoleAdmin):
    """Events that were sent, or will be, the newest first."""

    owner_path = None
    list_display = ("event", "shown_text", "when", "label", "attempts", "tried", "shown_error")
    list_filter = (("state", ChoicesCheckboxFilter), "event")
    list_filter_submit = True
    search_fields = ("event__startswith", "text__icontains")
    search_help_text = "Beginning of an event's name, or part of its text"
    ordering = ("-created_at",)
    sortable_by = ()
    fieldsets = (
        (
            None,
            {
                "fields": (
                    ("event", "label"),
                    ("when", "status"),
                    "text",
                    ("attempts", "tried"),
                    ("next_attempt", "shown_error"),
                    "message",
                )
            },
        ),
    )

    def has_view_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return bool(request.user.is_superuser)

    @admin.display(description="What")
    def shown_text(self, delivery: Delivery) -> SafeString:
        return one_line(delivery.text)

    @admin.display(description="When")
    def when(self, delivery: Delivery) -> SafeString | None:
        return moment(delivery.at)

    @admin.display(description="State")
    def label(self, delivery: Delivery) -> SafeString:
        return state_label(delivery.state)

    @admin.display(description="Last attempt")
    def tried(self, delivery: Delivery) -> SafeString | None:
        return moment(delivery.tried_at)

    @admin.display(description="Next attempt")
    def next_attempt(self, delivery: Delivery) -> SafeString | None:
        is_waiting = delivery.state == Delivery.DeliveryState.WAITING
        return moment(delivery.next_attempt_at) if is_waiting else None

    @admin.display(description="Last error")
    def shown_error(self, delivery: Delivery) -> str | None:
        return delivery.last_error or None

    @admin.display(description="Message id")
    def message(self, delivery: Delivery) -> SafeString:
        return copyable(delivery.message_id)
