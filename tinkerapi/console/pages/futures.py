"""Futures in the admin: view, cancel waiting ones, replay finished ones."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.defaultfilters import filesizeformat
from django.template.response import TemplateResponse
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import (
    AutocompleteSelectFilter,
    ChoicesCheckboxFilter,
)

from futures.cancelling import future_cancel
from futures.errors import FutureError
from futures.models import Future
from futures.overview import futures_cancellable, futures_replaying
from futures.queue_positions import queue_position
from futures.resubmitting import future_resubmit
from futures.transitions import FINAL_STATES, State
from tinkerapi.console.kit.console_admin import ConsoleAdmin, redirect, verb
from tinkerapi.console.kit.display import (
    duration,
    link,
    link_to,
    moment,
    one_line,
    page_url,
    state_label,
)
from tinkerapi.console.kit.filters import KindFilter, MomentFilter
from tinkerapi.console.kit.preview import body_preview
from training.errors import TrainingError
from training.models import Run
from training.overview import run_ids_named, with_run_names
from training.waiting import future_waiting

MAX_REPLAYS = 5
"""Most links to replays on a request's page."""


@admin.register(Future)
class FutureAdmin(ConsoleAdmin):
    """All requests for superusers, the user's own for others, newest first."""

    refusals = (FutureError, TrainingError)
    list_display = (
        "request_id",
        "kind",
        "state_label",
        "place",
        "facts",
        "created",
        "took",
        "owner_link",
    )
    list_filter = (
        ("state", ChoicesCheckboxFilter),
        KindFilter,
        ("owner", AutocompleteSelectFilter),
        ("created_at", MomentFilter),
    )
    list_filter_submit = True
    list_select_related = ("lane", "owner")
    search_fields = ("id__startswith", "lane__id__startswith", "idempotency_key__exact")
    search_help_text = "Run name, beginning of a request id or run id, or an idempotency key"
    ordering = ("-created_at",)
    sortable_by = ()
    actions = ("cancel_selected", "replay_selected")
    actions_detail = ("cancel", "replay")
    fieldsets = (
        (
            None,
            {
                "fields": (
                    ("state_label", "kind"),
                    ("owner_link", "queue"),
                    ("lane_link", "seq_id"),
                    ("worker_link", "ended_workers"),
                    ("created", "waited"),
                    ("started", "ran"),
                    ("finished", "cost"),
                    ("position", "batch"),
                    ("replay_link", "replays"),
                    ("idempotency_key", "pruned"),
                )
            },
        ),
    )
    change_form_outer_before_template = "admin/futures/future/waiting.html"
    change_form_outer_after_template = "admin/futures/future/bodies.html"

    def get_queryset(self, request: HttpRequest) -> QuerySet[Future]:
        rows: QuerySet[Future] = super().get_queryset(request)
        return with_run_names(rows.defer("payload", "result", "payload_digest"))

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Future], search_term: str
    ) -> tuple[QuerySet[Future], bool]:
        """Also by a run's name, and by an id as the list shows it: without its prefix,
        shortened."""
        found, may_have_duplicates = super().get_search_results(request, queryset, search_term)
        digits = search_term.strip().removesuffix("…")
        if re.fullmatch(r"[0-9a-f]{4,32}", digits):
            found |= queryset.filter(pk__startswith=f"future_{digits}")
        if search_term:
            found |= queryset.filter(lane_id__in=run_ids_named(search_term.strip()))
        return found, may_have_duplicates

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        obj: Future | None = None,
        **kwargs: Any,
    ) -> TemplateResponse:
        """Add what the request waits for, its payload and its result."""
        if obj is not None:
            context["waiting"] = waiting_sentence(obj)
            context["bodies"] = future_bodies(obj)
            context["facts"] = obj.summary_line.split("  ") if obj.summary else []
        response: TemplateResponse = super().render_change_form(request, context, obj=obj, **kwargs)
        if obj is not None and obj.is_final and request.headers.get("HX-Request"):
            response.headers["HX-Refresh"] = "true"  # its page still shows it waiting
        return response

    @admin.display(description="Request")
    def request_id(self, future: Future) -> str:
        return short_id(future)

    @admin.display(description="State")
    def state_label(self, future: Future) -> SafeString:
        return state_label(future.state)

    @admin.display(description="Summary")
    def facts(self, future: Future) -> SafeString:
        return one_line(summary_text(future))

    @admin.display(description="Owner")
    def owner_link(self, future: Future) -> SafeString | None:
        return link(future.owner)

    @admin.display(description="Run")
    def lane_link(self, future: Future) -> SafeString | None:
        """Its run, or the lane of its sampling session."""
        name = getattr(future, "run_name", None)
        if name is None or future.lane_id is None:
            return link(future.lane)
        return link_to(Run, future.lane_id, name)

    @admin.display(description="Run")
    def place(self, future: Future) -> SafeString | None:
        """Its lane, and its number there."""
        lane = self.lane_link(future)
        return lane and format_html(
            '<span class="whitespace-nowrap">'
            '<span class="console-line">{}</span> &middot; {}</span>',
            lane,
            future.seq_id,
        )

    @admin.display(description="Worker")
    def worker_link(self, future: Future) -> SafeString | None:
        return link(future.worker)

    @admin.display(description="Workers that ended while it ran")
    def ended_workers(self, future: Future) -> int:
        return future.attempts + future.interruptions

    @admin.display(description="Replay of")
    def replay_link(self, future: Future) -> SafeString | None:
        return request_link(future.replay_of)

    @admin.display(description="Replayed as")
    def replays(self, future: Future) -> SafeString | None:
        replays = futures_replaying(future, limit=MAX_REPLAYS)
        return format_html_join(", ", "{}", ((request_link(replay),) for replay in replays))

    @admin.display(description="Submitted")
    def created(self, future: Future) -> SafeString | None:
        return moment(future.created_at)

    @admin.display(description="Started")
    def started(self, future: Future) -> SafeString | None:
        return moment(future.started_at)

    @admin.display(description="Finished")
    def finished(self, future: Future) -> SafeString | None:
        return moment(future.finished_at)

    @admin.display(description="Pruned")
    def pruned(self, future: Future) -> SafeString | None:
        return moment(future.pruned_at)

    @admin.display(description="Waited")
    def waited(self, future: Future) -> str | None:
        """From the submission to the claim, or to now while it waits."""
        end = future.started_at or future.finished_at or timezone.now()
        return duration(end - future.created_at)

    @admin.display(description="Ran")
    def ran(self, future: Future) -> str | None:
        if future.started_at is None:
            return None
        return duration((future.finished_at or timezone.now()) - future.started_at)

    @admin.display(description="Waited + ran")
    def took(self, future: Future) -> SafeString:
        times = " + ".join(filter(None, [self.waited(future), self.ran(future)]))
        return format_html('<span class="whitespace-nowrap">{}</span>', times)

    @admin.display(description="Ahead of it in the queue")
    def position(self, future: Future) -> int | None:
        return queue_position(future) if future.state == State.PENDING else None

    def has_cancel_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return self.matches(request, object_id, pk__in=futures_cancellable())

    def has_replay_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return self.matches(request, object_id, state__in=FINAL_STATES, payload__isnull=False)

    @verb(
        "Cancel",
        permission="cancel",
        icon="cancel",
        danger=True,
        question="Cancel this request?",
        answer="Cancel the request",
        explanation="It will have no result. Clients that wait are told that it was cancelled.",
    )
    def cancel(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        future = self.row(request, object_id)
        self.cancel_one(request, future)
        return redirect(request, page_url(future))

    @verb(
        "Replay",
        permission="replay",
        icon="replay",
        question="Submit this request again?",
        answer="Submit again",
        explanation="The same request is added at the end of its lane as a new future. "
        "A training request changes its run again.",
    )
    def replay(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        future = self.row(request, object_id)
        return redirect(request, page_url(self.replay_one(request, future) or future))

    @admin.action(
        description="Cancel selected requests that may be cancelled", permissions=["cancel"]
    )
    def cancel_selected(self, request: HttpRequest, queryset: QuerySet[Future]) -> None:
        for future in queryset:
            self.cancel_one(request, future)

    @admin.action(description="Submit selected requests again", permissions=["replay"])
    def replay_selected(self, request: HttpRequest, queryset: QuerySet[Future]) -> None:
        for future in queryset.order_by("created_at"):
            self.replay_one(request, future)

    def cancel_one(self, request: HttpRequest, future: Future) -> None:
        self.attempt(
            request,
            future,
            "cancelled",
            lambda: future_cancel(request_id=future.pk, owner_id=future.owner_id),
        )

    def replay_one(self, request: HttpRequest, future: Future) -> Future | None:
        return self.attempt(
            request, future, "submitted again", lambda: future_resubmit(request_id=future.pk)
        )


def waiting_sentence(future: Future) -> str | None:
    """What a request that is not final waits for, and about how long, as clients are told."""
    if future.is_final:
        return None
    found = future_waiting(future)
    seconds = found.estimated_wait_seconds
    if seconds is None:
        return found.reason
    return f"{found.reason} About {duration(timedelta(seconds=seconds))} until it is finished."


def short_id(future: Future) -> str:
    """A part of the request id that distinguishes requests; the page has the whole id."""
    return f"{future.pk.removeprefix('future_')[:8]}…"


def request_link(future: Future | None) -> SafeString | None:
    return link(future, short_id(future)) if future is not None else None


def summary_text(future: Future) -> str:
    """A future in one line of a table: its error, or its summary."""
    if future.error:
        return future.error.split("\n")[0][:200]
    return future.summary_line.replace("  ", " · ")[:200]


def future_bodies(future: Future) -> list[dict[str, str]]:
    """Payload and result for a future's page; loads both."""
    pruned = "pruned by the retention policy"
    no_result = {State.FAILED: "none: it failed", State.CANCELLED: "none: it was cancelled"}.get(
        State(future.state), pruned if future.pruned_at else "none yet"
    )
    return [
        {
            "title": title,
            "text": body_preview(body) if body is not None else missing,
            "size": filesizeformat(len(body)) if body is not None else "",
        }
        for title, body, missing in (
            ("Request", future.payload, pruned),
            ("Result", future.result, no_result),
        )
    ]
