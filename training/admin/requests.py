"""Futures again, now that lanes are known to be runs."""

from __future__ import annotations

from django.contrib import admin
from django.db.models import OuterRef, QuerySet, Subquery
from django.http import HttpRequest
from django.utils.safestring import SafeString

from futures.admin.futures import FutureAdmin
from futures.display import link_to
from futures.errors import FutureError
from futures.models import Future
from training.errors import TrainingError
from training.models import Run

admin.site.unregister(Future)


@admin.register(Future)
class RequestAdmin(FutureAdmin):
    """Futures again, now that lanes are known to be runs."""

    refusals = (FutureError, TrainingError)
    search_help_text = "Run name, beginning of a request id or run id, or an idempotency key"

    def get_queryset(self, request: HttpRequest) -> QuerySet[Future]:
        run = Run.objects.filter(pk=OuterRef("lane_id"))
        return super().get_queryset(request).annotate(run_name=Subquery(run.values("name")[:1]))

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Future], search_term: str
    ) -> tuple[QuerySet[Future], bool]:
        found, may_have_duplicates = super().get_search_results(request, queryset, search_term)
        if search_term:
            runs = Run.objects.filter(name=search_term.strip())
            found |= queryset.filter(lane_id__in=list(runs.values_list("pk", flat=True)))
        return found, may_have_duplicates

    @admin.display(description="Run")
    def lane_link(self, future: Future) -> SafeString | None:
        name = getattr(future, "run_name", None)
        if name is None or future.lane_id is None:
            return super().lane_link(future)
        return link_to(Run, future.lane_id, name)
