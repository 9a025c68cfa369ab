"""Deletes several checkpoints that were chosen in the list, after a page with the sum."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.defaultfilters import filesizeformat
from django.template.response import TemplateResponse

from tinkerapi.console.kit.console_admin import ConsoleAdmin, redirect
from tinkerapi.console.kit.display import changelist_url, moment
from training.models import Checkpoint
from training.services.upkeep import checkpoint_delete


class CheckpointDeletion(ConsoleAdmin):
    """The list's action. Only rows that this person may see can be chosen."""

    actions = ("delete_selected_checkpoints",)

    @admin.action(description="Delete selected checkpoints", permissions=["view"])
    def delete_selected_checkpoints(
        self, request: HttpRequest, queryset: QuerySet[Checkpoint]
    ) -> HttpResponse:
        chosen = list(queryset.select_related("run__owner", "run__session").order_by("-size_bytes"))
        if request.POST.get("confirmed") == "yes":
            return self._delete(request, chosen)
        context = {
            **self.admin_site.each_context(request),
            "title": "Delete checkpoints",
            "checkpoints": chosen,
            "freed": sum(checkpoint.size_bytes for checkpoint in chosen),
            "published": sum(checkpoint.public for checkpoint in chosen),
            "shares_files": any("copy_of" in checkpoint.run.user_metadata for checkpoint in chosen),
            "table": _table(chosen, with_owner=bool(request.user.is_superuser)),
            "list_url": changelist_url(Checkpoint),
        }
        return TemplateResponse(request, "admin/training/checkpoint/delete_selected.html", context)

    def _delete(self, request: HttpRequest, chosen: list[Checkpoint]) -> HttpResponse:
        freed = deleted = 0
        for checkpoint in chosen:
            if checkpoint_delete(checkpoint_id=checkpoint.pk, actor_id=request.user.pk):
                self.log_change(request, checkpoint, "deleted")
                freed += checkpoint.size_bytes
                deleted += 1
        noun = "checkpoint" if deleted == 1 else "checkpoints"
        messages.success(request, f"{deleted} {noun} deleted, {filesizeformat(freed)} freed")
        return redirect(request, changelist_url(Checkpoint))


def _table(chosen: list[Checkpoint], *, with_owner: bool) -> dict[str, Any]:
    rows = [
        [
            str(checkpoint.path),
            *([checkpoint.run.owner.get_username()] if with_owner else []),
            filesizeformat(checkpoint.size_bytes),
            moment(checkpoint.created_at),
            "published" if checkpoint.public else "",
        ]
        for checkpoint in chosen
    ]
    owner = ["User"] if with_owner else []
    return {"headers": ["Checkpoint", *owner, "Size", "Saved", ""], "rows": rows}
