"""The buttons of a checkpoint's page: try, download, publish, expire, delete."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django import forms
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils.http import urlencode
from unfold.forms import BaseDialogForm
from unfold.widgets import UnfoldAdminIntegerFieldWidget as NumberInput

from tinkerapi.api.sdk.render.links import archive_link
from tinkerapi.console.kit.console_admin import ConsoleAdmin, link_button, redirect, verb
from tinkerapi.console.kit.display import changelist_url, page_url
from tinkerapi.console.playground import ADDRESS, model_of
from training.base_models import base_models
from training.models import Checkpoint
from training.services.checkpoints import checkpoint_audit_read
from training.services.upkeep import checkpoint_delete, checkpoint_publish, checkpoint_set_ttl

MAX_DAYS = 3650


class ExpiryForm(BaseDialogForm):  # type: ignore[misc]  # unfold has no type information
    """When a checkpoint is deleted."""

    days = forms.IntegerField(
        min_value=1,
        max_value=MAX_DAYS,
        required=False,
        widget=NumberInput,
        label="Delete it after days",
        help_text="Counted from now; empty: never",
    )


class CheckpointActions(ConsoleAdmin):
    """The actions for a checkpoint, for its owner and for superusers."""

    def has_try_it_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        """Weights for other programs cannot be sampled, nor those of a base model that is not
        served."""
        served = [model.name for model in base_models()]
        kinds = (Checkpoint.Kind.TRAINING, Checkpoint.Kind.SAMPLER)
        return self.matches(request, object_id, kind__in=kinds, run__base_model__in=served)

    @link_button("Try it", permission="try_it", icon="forum")
    def try_it(self, request: HttpRequest, object_id: str) -> HttpResponse:
        checkpoint = self.row(request, object_id)
        query = urlencode({"model": model_of(checkpoint), "other": checkpoint.run.base_model})
        return redirect(request, f"{reverse(ADDRESS)}?{query}")

    def has_owner_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return self.matches(request, object_id)

    @link_button("Download", permission="owner", icon="download")
    def download(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Its files in one tar, from a link that works for an hour."""
        checkpoint = self.row(request, object_id)
        reader_id = request.user.pk or 0
        checkpoint_audit_read(checkpoint, reader_id=reader_id, purpose="download")
        link = archive_link(request, checkpoint, reader_id=checkpoint.owner_id)
        return redirect(request, link.url)

    def has_publish_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return self.matches(request, object_id, public=False)

    @verb(
        "Publish",
        permission="publish",
        icon="public",
        question="Publish this checkpoint?",
        answer="Publish it",
        explanation="Every user of this server can then sample, load and download it, at the path "
        "that begins with its run's id.",
    )
    def publish(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        return self._set_public(request, object_id, True, "published")

    def has_withdraw_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return self.matches(request, object_id, public=True)

    @verb(
        "Withdraw",
        permission="withdraw",
        icon="public_off",
        question="Withdraw this checkpoint?",
        answer="Withdraw it",
        explanation="From then on only its owner can read it. Copies that others have made stay.",
    )
    def withdraw(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        return self._set_public(request, object_id, False, "withdrawn")

    def _set_public(
        self, request: HttpRequest, object_id: str, public: bool, sentence: str
    ) -> HttpResponse:
        checkpoint = self.row(request, object_id)
        mine: dict[str, Any] = {"owner_id": checkpoint.owner_id, "path": checkpoint.global_path}
        self.attempt(
            request,
            checkpoint,
            sentence,
            lambda: checkpoint_publish(**mine, public=public, actor_id=request.user.pk),
        )
        return redirect(request, page_url(checkpoint))

    @verb(
        "Expiry",
        permission="owner",
        icon="timer",
        question="When is this checkpoint deleted?",
        answer="Set it",
        explanation="After that its files are deleted, and nothing can load or sample it.",
        form_class=ExpiryForm,
    )
    def set_expiry(self, request: HttpRequest, form: ExpiryForm, object_id: str) -> HttpResponse:
        checkpoint = self.row(request, object_id)
        days = form.cleaned_data["days"]
        seconds = None if days is None else int(timedelta(days=days).total_seconds())
        mine: dict[str, Any] = {"owner_id": checkpoint.owner_id, "path": checkpoint.global_path}
        self.attempt(
            request,
            checkpoint,
            "does not expire" if days is None else f"expires in {days} days",
            lambda: checkpoint_set_ttl(**mine, ttl_seconds=seconds, actor_id=request.user.pk),
        )
        return redirect(request, page_url(checkpoint))

    def has_delete_checkpoint_permission(
        self, request: HttpRequest, object_id: str | None = None
    ) -> bool:
        return self.matches(request, object_id)

    @verb(
        "Delete",
        permission="delete_checkpoint",
        icon="delete",
        danger=True,
        question="Delete this checkpoint?",
        answer="Delete the checkpoint",
        explanation="Its files are deleted. This cannot be undone.",
    )
    def delete_checkpoint(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        checkpoint = self.row(request, object_id)
        self.attempt(
            request,
            checkpoint,
            "deleted",
            lambda: checkpoint_delete(checkpoint_id=checkpoint.pk, actor_id=request.user.pk),
        )
        return redirect(request, changelist_url(Checkpoint))
