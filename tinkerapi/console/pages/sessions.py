"""Sessions in the admin: SDK processes and their sampling sessions."""

from __future__ import annotations

from django.contrib import admin
from django.utils import timezone
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import AutocompleteSelectFilter, ChoicesCheckboxFilter

from futures.overview import lane_find
from tinkerapi.console.kit.console_admin import ConsoleAdmin
from tinkerapi.console.kit.display import link, list_link, moment, preformatted, state_label
from tinkerapi.console.kit.filters import MomentFilter
from tinkerapi.console.kit.preview import value_preview
from training.client_silence import SHOWN_AS_GONE
from training.models import Run, SamplingSession, Session


@admin.register(Session)
class SessionAdmin(ConsoleAdmin):
    """Processes of the SDK, the latest heartbeat first."""

    list_display = ("id", "name", "owner_link", "state", "sdk_version", "heartbeat", "created")
    list_filter = (
        ("finish_reason", ChoicesCheckboxFilter),
        ("owner", AutocompleteSelectFilter),
        ("created_at", MomentFilter),
    )
    list_filter_submit = True
    list_select_related = ("owner",)
    search_fields = ("id__startswith", "display_name__icontains", "project_id__icontains")
    search_help_text = "Beginning of a session id, or part of a name or project"
    ordering = ("-created_at",)
    sortable_by = ()
    fieldsets = (
        (
            None,
            {
                "fields": (
                    ("id", "name"),
                    ("owner_link", "state"),
                    ("sdk_version", "project_id"),
                    ("created", "heartbeat"),
                    ("finished", "finish_detail"),
                    ("runs", "sampling_sessions"),
                )
            },
        ),
        ("Set by the client", {"fields": ("labels", "metadata")}),
    )

    @admin.display(description="Name")
    def name(self, session: Session) -> str:
        return session.display_name

    @admin.display(description="Owner")
    def owner_link(self, session: Session) -> SafeString | None:
        return link(session.owner)

    @admin.display(description="State")
    def state(self, session: Session) -> SafeString:
        if session.finish_reason:
            return state_label(session.finish_reason)
        is_silent = timezone.now() - session.heartbeat_at > SHOWN_AS_GONE
        return state_label("client gone" if is_silent else "active")

    @admin.display(description="Heartbeat")
    def heartbeat(self, session: Session) -> SafeString | None:
        return moment(session.heartbeat_at)

    @admin.display(description="Created")
    def created(self, session: Session) -> SafeString | None:
        return moment(session.created_at)

    @admin.display(description="Finished")
    def finished(self, session: Session) -> SafeString | None:
        return moment(session.finished_at)

    @admin.display(description="Runs")
    def runs(self, session: Session) -> SafeString:
        return list_link(Run, "runs of this session", session__id__exact=session.pk)

    @admin.display(description="Sampling sessions")
    def sampling_sessions(self, session: Session) -> SafeString:
        return list_link(SamplingSession, "its sampling sessions", session__id__exact=session.pk)

    @admin.display(description="Tags")
    def labels(self, session: Session) -> SafeString | None:
        return preformatted(value_preview(session.tags)) if session.tags else None

    @admin.display(description="Metadata")
    def metadata(self, session: Session) -> SafeString | None:
        metadata = session.user_metadata
        return preformatted(value_preview(metadata)) if metadata else None


@admin.register(SamplingSession)
class SamplingSessionAdmin(ConsoleAdmin):
    """Sampling sessions: each has a base model or a checkpoint."""

    owner_path = "session__owner"
    list_display = ("id", "base_model", "source", "owner_link", "num_clients", "created")
    list_filter = (("session__owner", AutocompleteSelectFilter), ("created_at", MomentFilter))
    list_filter_submit = True
    list_select_related = ("session__owner", "checkpoint__run")
    search_fields = ("id__startswith", "model_path__icontains", "base_model__icontains")
    search_help_text = "Beginning of an id, or part of a path or base model"
    ordering = ("-created_at",)
    sortable_by = ()
    fieldsets = (
        (
            None,
            {
                "fields": (
                    ("id", "session_link"),
                    ("base_model", "source"),
                    ("owner_link", "num_clients"),
                    ("created", "lane"),
                )
            },
        ),
    )

    @admin.display(description="Session")
    def session_link(self, sampling_session: SamplingSession) -> SafeString | None:
        return link(sampling_session.session)

    @admin.display(description="Weights")
    def source(self, sampling_session: SamplingSession) -> SafeString | str | None:
        """The checkpoint, shown by its path even if it is deleted."""
        path = sampling_session.model_path
        return link(sampling_session.checkpoint, path) or path or None

    @admin.display(description="Owner")
    def owner_link(self, sampling_session: SamplingSession) -> SafeString | None:
        return link(sampling_session.session.owner)

    @admin.display(description="Created")
    def created(self, sampling_session: SamplingSession) -> SafeString | None:
        return moment(sampling_session.created_at)

    @admin.display(description="Requests")
    def lane(self, sampling_session: SamplingSession) -> SafeString | None:
        return link(lane_find(sampling_session.pk), "its lane")
