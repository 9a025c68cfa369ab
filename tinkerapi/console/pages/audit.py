"""The audit log in the admin: read-only, for superusers."""

from __future__ import annotations

from django.contrib import admin
from django.db.models import Model
from django.http import HttpRequest
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import AutocompleteSelectFilter

from tinkerapi.console.kit.console_admin import ConsoleAdmin
from tinkerapi.console.kit.display import link, moment, preformatted
from tinkerapi.console.kit.filters import MomentFilter
from tinkerapi.console.kit.preview import value_preview
from training.models import AuditEvent


@admin.register(AuditEvent)
class AuditEventAdmin(ConsoleAdmin):
    """Audit events, the newest first."""

    list_display = ("event", "done", "actor_link", "owner_link", "tinker_path")
    list_filter = (
        "event",
        ("actor", AutocompleteSelectFilter),
        ("created_at", MomentFilter),
    )
    list_filter_submit = True
    list_select_related = ("actor", "owner")
    search_fields = ("event__startswith", "details__tinker_path__icontains")
    search_help_text = "Beginning of an event's name, or part of a path"
    ordering = ("-created_at",)
    sortable_by = ()
    fieldsets = ((None, {"fields": (("event", "done"), ("actor_link", "owner_link"), "facts")}),)

    def has_view_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return bool(request.user.is_superuser)

    @admin.display(description="When")
    def done(self, event: AuditEvent) -> SafeString | None:
        return moment(event.created_at)

    @admin.display(description="Who")
    def actor_link(self, event: AuditEvent) -> SafeString | str | None:
        if event.actor:
            return link(event.actor)
        address = event.details.get("address")
        return f"somebody at {address}" if address else "the server or its console"

    @admin.display(description="Whose")
    def owner_link(self, event: AuditEvent) -> SafeString | None:
        return link(event.owner)

    @admin.display(description="Path")
    def tinker_path(self, event: AuditEvent) -> str | None:
        path: str | None = event.details.get("tinker_path")
        return path

    @admin.display(description="Details")
    def facts(self, event: AuditEvent) -> SafeString | None:
        return preformatted(value_preview(event.details)) if event.details else None
