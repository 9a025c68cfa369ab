"""Checkpoints and snapshots in the admin: contents, owner and size."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.template.defaultfilters import filesizeformat
from django.urls import URLPattern, path
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import (
    AutocompleteSelectFilter,
    ChoicesCheckboxFilter,
)

from futures.errors import FutureError
from futures.overview import future_in_lane, worker_find
from tinkerapi.console.kit.console_admin import (
    ConsoleAdmin,
    ConsoleList,
)
from tinkerapi.console.kit.display import (
    copyable,
    duration,
    link,
    moment,
    preformatted,
)
from tinkerapi.console.kit.filters import MomentFilter
from tinkerapi.console.kit.preview import value_preview
from tinkerapi.console.pages.checkpoint_actions import CheckpointActions
from tinkerapi.console.pages.checkpoint_deletion import CheckpointDeletion
from tinkerapi.console.pages.storage import storage_page
from tinkerapi.console.playground import playground_page
from training.errors import TrainingError
from training.models import Checkpoint, Snapshot


class CheckpointList(ConsoleList):
    """A list without the checkpoints of sampling sessions, which have no path."""

    def get_queryset(self, request: HttpRequest, *args: Any, **kwargs: Any) -> QuerySet[Checkpoint]:
        rows: QuerySet[Checkpoint] = super().get_queryset(request, *args, **kwargs)
        return rows.filter(ephemeral=False)


@admin.register(Checkpoint)
class CheckpointAdmin(CheckpointActions, CheckpointDeletion, ConsoleAdmin):
    """Saved checkpoints and their size."""

    owner_path = "run__owner"
    refusals = (FutureError, TrainingError)
    list_display = (
        "shown_name",
        "kind",
        "run_link",
        "owner_link",
        "step",
        "size",
        "created",
        "expires",
    )
    list_filter = (
        ("kind", ChoicesCheckboxFilter),
        ("run__owner", AutocompleteSelectFilter),
        ("created_at", MomentFilter),
    )
    list_filter_submit = True
    list_select_related = ("run__owner", "run__session")
    search_fields = ("name__icontains", "run__name__icontains", "run__id__startswith")
    search_help_text = "Part of a checkpoint's or a run's name, or the beginning of a run id"
    ordering = ("-created_at",)
    sortable_by = ("size", "created", "step")
    actions_detail = (
        "try_it",
        "download",
        "publish",
        "withdraw",
        "set_expiry",
        "delete_checkpoint",
    )
    fieldsets = (
        (
            None,
            {
                "fields": (
                    ("path", "kind"),
                    ("run_link", "owner_link"),
                    ("step", "saved_by"),
                    ("size", "sharing"),
                    ("created", "expires"),
                    "directory",
                )
            },
        ),
        ("Metadata", {"fields": ("metadata",)}),
    )

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[CheckpointList]:
        return CheckpointList

    @admin.display(description="Name", ordering="name")
    def shown_name(self, checkpoint: Checkpoint) -> SafeString:
        """Its name, and its path beneath."""
        return format_html("{}<br>{}", checkpoint.name, copyable(str(checkpoint.path)))

    @admin.display(description="Path")
    def path(self, checkpoint: Checkpoint) -> SafeString:
        return copyable(str(checkpoint.path))

    @admin.display(description="Who may read it")
    def sharing(self, checkpoint: Checkpoint) -> str:
        return "everybody, at its published path" if checkpoint.public else "its owner"

    @admin.display(description="Run")
    def run_link(self, checkpoint: Checkpoint) -> SafeString | None:
        return link(checkpoint.run, checkpoint.run.shown_title)

    @admin.display(description="Owner")
    def owner_link(self, checkpoint: Checkpoint) -> SafeString | None:
        return link(checkpoint.run.owner)

    @admin.display(description="Saved by")
    def saved_by(self, checkpoint: Checkpoint) -> SafeString | None:
        future = future_in_lane(checkpoint.run_id, checkpoint.seq_id)
        return link(future, f"request {checkpoint.seq_id} of the run")

    @admin.display(description="Size", ordering="size_bytes")
    def size(self, checkpoint: Checkpoint) -> str:
        return filesizeformat(checkpoint.size_bytes)

    @admin.display(description="Saved", ordering="created_at")
    def created(self, checkpoint: Checkpoint) -> SafeString | None:
        return moment(checkpoint.created_at)

    @admin.display(description="Expires")
    def expires(self, checkpoint: Checkpoint) -> SafeString | None:
        return moment(checkpoint.expires_at)

    @admin.display(description="Set by the client")
    def metadata(self, checkpoint: Checkpoint) -> SafeString | None:
        metadata = checkpoint.user_metadata
        return preformatted(value_preview(metadata)) if metadata else None

    def get_urls(self) -> list[URLPattern]:
        """Also the playground, which every checkpoint links to, and what takes how much space."""
        site = self.admin_site
        own = [
            path(
                "playground/",
                site.admin_view(partial(playground_page, site=site)),
                name="training_checkpoint_playground",
            ),
            path(
                "storage/",
                site.admin_view(partial(storage_page, site=site)),
                name="training_checkpoint_storage",
            ),
        ]
        urls: list[URLPattern] = super().get_urls()
        return own + urls


@admin.register(Snapshot)
class SnapshotAdmin(ConsoleAdmin):
    """The server's own saved states, for rebuilding runs after a crash."""

    owner_path = "run__owner"
    list_display = ("snapshot", "run_link", "seq_id", "step", "size", "write_time", "created")
    list_filter = (("created_at", MomentFilter),)
    list_filter_submit = True
    list_select_related = ("run",)
    search_fields = ("run__name__icontains", "run__id__startswith")
    search_help_text = "Part of a run's name, or the beginning of a run id"
    ordering = ("-created_at",)
    sortable_by = ("size", "created")
    fieldsets = (
        (
            None,
            {
                "fields": (
                    ("run_link", "seq_id"),
                    ("step", "worker"),
                    ("size", "write_time"),
                    "created",
                    "directory",
                )
            },
        ),
    )

    @admin.display(description="Snapshot")
    def snapshot(self, snapshot: Snapshot) -> str:
        return f"#{snapshot.pk}"

    @admin.display(description="Run")
    def run_link(self, snapshot: Snapshot) -> SafeString | None:
        return link(snapshot.run)

    @admin.display(description="Size", ordering="size_bytes")
    def size(self, snapshot: Snapshot) -> str:
        return filesizeformat(snapshot.size_bytes)

    @admin.display(description="Written by")
    def worker(self, snapshot: Snapshot) -> SafeString | None:
        return link(worker_find(snapshot.epoch))

    @admin.display(description="Written in")
    def write_time(self, snapshot: Snapshot) -> str | None:
        return duration(timedelta(seconds=snapshot.write_seconds))

    @admin.display(description="Taken", ordering="created_at")
    def created(self, snapshot: Snapshot) -> SafeString | None:
        return moment(snapshot.created_at)
