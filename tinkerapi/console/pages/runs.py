"""Runs in the admin: the list, and the frame of a run's page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import URLPattern, path
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import (
    AutocompleteSelectFilter,
    ChoicesCheckboxFilter,
)
from unfold.forms import BaseDialogForm
from unfold.widgets import UnfoldAdminTextareaWidget as TextArea
from unfold.widgets import UnfoldAdminTextInputWidget as TextInput

from futures.errors import FutureError
from futures.overview import lane_find, lane_waiting
from tinkerapi.api.sdk.render.links import trace_link
from tinkerapi.console.kit.console_admin import link_button, redirect, verb
from tinkerapi.console.kit.display import (
    copyable,
    link,
    moment,
    page_url,
    state_label,
)
from tinkerapi.console.kit.filters import MomentFilter
from tinkerapi.console.pages.compare import MAX_RUNS, compare_page, compare_url
from tinkerapi.console.pages.run_curves import curves_export, curves_json
from tinkerapi.console.pages.run_replays import RunReplays
from tinkerapi.console.pages.run_sections import last_result as result_text
from tinkerapi.console.pages.run_status import OWN_OBJECTIVE
from tinkerapi.console.pages.run_tabs import tab_context
from training.activity import activity, with_activity
from training.errors import TrainingError
from training.models import Run
from training.overview import run_find_one
from training.progress import with_progress
from training.services import run_describe, run_remove_submit

WORDS = ("title", "tags", "notes")
"""The fields of a run that people write."""


class DescribeForm(BaseDialogForm):  # type: ignore[misc]  # unfold has no type information
    """A run's name for people, words to find it by, and notes."""

    title = forms.CharField(
        max_length=200, required=False, widget=TextInput, help_text="Empty: the client's own name"
    )
    tags = forms.CharField(
        max_length=500, required=False, widget=TextInput, help_text="With commas between them"
    )
    notes = forms.CharField(max_length=10_000, required=False, widget=TextArea)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        me = self.request.user
        owner_id = None if me.is_superuser else me.pk
        run = run_find_one(unquote(str(self.object_id)), owner_id=owner_id)
        for name in WORDS:
            self.fields[name].initial = getattr(run, name, "")


@admin.register(Run)
class RunAdmin(RunReplays):
    """Runs with their progress. What the page's tabs show is in ``run_tabs``."""

    refusals = (FutureError, TrainingError)
    list_display = (
        "shown_title",
        "state_label",
        "owner_link",
        "base_model",
        "rank",
        "step",
        "trained_tokens",
        "last_result",
        "last_request",
        "created",
    )
    list_filter = (
        ("state", ChoicesCheckboxFilter),
        ("owner", AutocompleteSelectFilter),
        ("created_at", MomentFilter),
    )
    list_filter_submit = True
    list_select_related = ("owner", "session")
    search_fields = (
        "title__icontains",
        "tags__icontains",
        "notes__icontains",
        "user_metadata__name__icontains",
        "session__display_name__icontains",
        "session__user_metadata__name__icontains",
        "name__icontains",
        "id__startswith",
        "base_model__icontains",
    )
    search_help_text = "Part of a name, a tag, the notes or a base model, or the beginning of an id"
    sortable_by = ("shown_title", "step", "trained_tokens", "last_request", "created")
    actions = ("compare_selected",)
    actions_detail = ("describe", "trace", "replay", "fork", "remove")
    fieldsets = (
        (
            None,
            {
                "fields": (
                    ("model_id", "state_label"),
                    ("notes", "tag_labels"),
                    ("owner_link", "base_model"),
                    ("rank", "trains"),
                    ("alpha", "seed"),
                    ("step", "trained_tokens"),
                    ("applied_seq_id", "waiting"),
                    ("created", "last_request"),
                    ("replay_link", "removed"),
                    ("session_link", "lane"),
                    "objective",
                    "id",
                )
            },
        ),
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Run]:
        runs = with_activity(with_progress(super().get_queryset(request)))
        return runs.order_by("-newest_request_at")

    def get_urls(self) -> list[URLPattern]:
        """Also the numbers of the curves, and their downloads."""
        own = [
            path(
                "compare/", self.admin_site.admin_view(self._compare), name="training_run_compare"
            ),
            path("<path:object_id>/curves/", self._view(curves_json), name="training_run_curves"),
            path("<path:object_id>/export/", self._view(curves_export), name="training_run_export"),
        ]
        urls: list[URLPattern] = super().get_urls()
        return own + urls

    def _compare(self, request: HttpRequest) -> HttpResponse:
        return compare_page(request, self.admin_site, self.get_queryset(request))

    @admin.action(description="Compare selected runs", permissions=["view"])
    def compare_selected(self, request: HttpRequest, queryset: QuerySet[Run]) -> HttpResponse:
        run_ids = list(queryset.values_list("pk", flat=True)[: MAX_RUNS + 1])
        if len(run_ids) > MAX_RUNS:
            messages.warning(request, f"Only {MAX_RUNS} runs can be compared; these are the first.")
        return redirect(request, compare_url(run_ids[:MAX_RUNS]))

    def _view(self, answer: Callable[[HttpRequest, Run], HttpResponse]) -> Callable[..., Any]:
        """A view of the run of an address, for those who may see its page."""

        def view(request: HttpRequest, object_id: str) -> HttpResponse:
            return answer(request, self.row(request, object_id))

        checked: Callable[..., Any] = self.admin_site.admin_view(view)
        return checked

    def render_change_form(
        self, request: HttpRequest, context: dict[str, Any], obj: Run | None = None, **kwargs: Any
    ) -> TemplateResponse:
        """Add the tabs, and what the chosen one shows."""
        if obj is not None:
            context |= tab_context(request, obj)
        response: TemplateResponse = super().render_change_form(request, context, obj=obj, **kwargs)
        return response

    @admin.display(description="Name", ordering="name")
    def shown_title(self, run: Run) -> SafeString:
        """The run's name; its id beneath, where that is another."""
        if run.shown_title == run.name:
            return format_html("{}", run.name)
        return format_html("{}<br>{}", run.shown_title, copyable(run.name))

    @admin.display(description="Model id")
    def model_id(self, run: Run) -> SafeString:
        return copyable(run.name)

    @admin.display(description="Tags")
    def tag_labels(self, run: Run) -> SafeString:
        tags = [tag.strip() for tag in run.tags.split(",")]
        return format_html_join(" ", "{}", ((state_label(tag),) for tag in tags if tag))

    @admin.display(description="State")
    def state_label(self, run: Run) -> SafeString:
        return state_label(activity(run))

    @admin.display(description="Owner")
    def owner_link(self, run: Run) -> SafeString | None:
        return link(run.owner)

    @admin.display(description="Tokens", ordering="tokens")
    def trained_tokens(self, run: Run) -> str:
        return f"{run.tokens:,}"

    @admin.display(description="Loss or reward")
    def last_result(self, run: Run) -> str | None:
        return result_text(run)

    @admin.display(description="Last request", ordering="newest_request_at")
    def last_request(self, run: Run) -> SafeString | None:
        return moment(getattr(run, "newest_request_at", None))

    @admin.display(description="Created", ordering="created_at")
    def created(self, run: Run) -> SafeString | None:
        return moment(run.created_at)

    @admin.display(description="Removed")
    def removed(self, run: Run) -> SafeString | None:
        return moment(run.deleted_at)

    @admin.display(description="Replay of")
    def replay_link(self, run: Run) -> SafeString | None:
        return link(run.replay_of)

    @admin.display(description="Session")
    def session_link(self, run: Run) -> SafeString | None:
        return link(run.session)

    @admin.display(description="Trains")
    def trains(self, run: Run) -> str:
        """The modules with an adapter."""
        if run.target_modules is not None:
            return ", ".join(run.target_modules)
        parts = {"attn": run.train_attn, "mlp": run.train_mlp, "unembed": run.train_unembed}
        return ", ".join(name for name, is_trained in parts.items() if is_trained)

    @admin.display(description="Objective")
    def objective(self, run: Run) -> str | None:
        """Shown if the loss's name could mislead."""
        return OWN_OBJECTIVE if run.own_objective else None

    @admin.display(description="Waiting")
    def waiting(self, run: Run) -> int:
        return lane_waiting(run.pk)

    @admin.display(description="Lane")
    def lane(self, run: Run) -> SafeString | None:
        return link(lane_find(run.pk), "order of its requests")

    @verb(
        "Name",
        icon="edit",
        question="What is this run called?",
        answer="Save",
        explanation="For people only: the API still uses its model id.",
        form_class=DescribeForm,
    )
    def describe(self, request: HttpRequest, form: DescribeForm, object_id: str) -> HttpResponse:
        run = self.row(request, object_id)
        words = {name: form.cleaned_data[name] for name in WORDS}
        actor_id = request.user.pk
        self.attempt(
            request, run, "described", lambda: run_describe(run, actor_id=actor_id, **words)
        )
        return redirect(request, page_url(run))

    @link_button("Trace", icon="timeline")
    def trace(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Its requests over time, as a file for Perfetto, from a link that works for an hour."""
        return redirect(request, trace_link(request, self.row(request, object_id)).url)

    def has_remove_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return self.matches(request, object_id, deleted_at__isnull=True)

    @verb(
        "Remove",
        permission="remove",
        icon="delete",
        danger=True,
        question="Remove this run?",
        answer="Remove the run",
        explanation="Its adapter leaves the worker when the requests before it are finished, "
        "and its name is free again. Its checkpoints and its history stay.",
    )
    def remove(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        run = self.row(request, object_id)
        self.attempt(
            request,
            run,
            "removed",
            lambda: run_remove_submit(owner_id=run.owner_id, model_id=run.name),
        )
        return redirect(request, page_url(run))
