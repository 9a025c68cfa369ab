"""The admin as a console: pages are windows on rows, and their few verbs call services.

Nothing is added, edited or deleted through a form. Superusers see every row; other staff
users see what they own, without needing permissions for it. A verb is asked for twice (its
dialog is the second time) and comes in a POST, so that no link on another page can pull it.
Lists stay cheap on a table of millions: no full count, no sorting but by an index.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlencode

from django.contrib import messages
from django.contrib.admin import ShowFacets
from django.contrib.admin.utils import quote, unquote
from django.core.paginator import Paginator
from django.db.models import Model, QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils import timezone
from django.utils.functional import cached_property
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.decorators import action
from unfold.enums import ActionVariant
from unfold.forms import BaseDialogForm
from unfold.views import ChangeList

from futures.errors import FutureError

Outcome = TypeVar("Outcome")
Method = TypeVar("Method", bound=Callable[..., HttpResponse])

COUNT_LIMIT = 10_000
"""Rows that a list counts and pages through; what lies behind is found by search and filters."""

STATE_VARIANTS = {
    "pending": "info",
    "starting": "info",
    "creating": "info",
    "running": "warning",
    "ready": "success",
    "live": "success",
    "active": "success",
    "failed": "danger",
    "lost": "danger",
    "silent": "danger",
    "revoked": "danger",
}
"""State to the colour of its label; all other states are grey."""


UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


class BoundedPaginator(Paginator):  # type: ignore[type-arg]  # no subscript at run time
    """Pages over the first ``COUNT_LIMIT`` rows, counting no further."""

    @cached_property
    def count(self) -> int:
        rows: QuerySet[Any] = self.object_list  # type: ignore[assignment]  # the admin's own
        return rows.order_by().values("pk")[:COUNT_LIMIT].count()


class ConsoleList(ChangeList):  # type: ignore[misc]  # unfold has no type information
    """A list that offers "show all" only where something is hidden by a search or a filter."""

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        if not self.query and not self.has_active_filters:
            self.full_result_count = self.result_count


class ConsoleAdmin(ModelAdmin):  # type: ignore[misc]  # unfold has no type information
    """A read-only window on the rows of one model."""

    owner_path: ClassVar[str | None] = "owner"
    """Lookup from the row to the user who owns it; None for what belongs to nobody."""
    refusals: ClassVar[tuple[type[Exception], ...]] = (FutureError,)
    """Errors of services whose sentence is shown to the person."""

    paginator = BoundedPaginator
    show_full_result_count = False
    show_facets = ShowFacets.NEVER  # each facet would count the whole table
    list_per_page = 50
    list_disable_select_all = True
    show_add_link = False

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows: QuerySet[Any] = super().get_queryset(request)
        if self.owner_path is None or request.user.is_superuser:
            return rows
        return rows.filter(**{self.owner_path: request.user.pk})

    def get_list_display(self, request: HttpRequest) -> list[str]:
        """Who owns a row is news to superusers only."""
        names = super().get_list_display(request)
        return [name for name in names if name != "owner_link" or request.user.is_superuser]

    def get_list_filter(self, request: HttpRequest) -> list[Any]:
        """A filter over users would tell who else is here."""
        filters = super().get_list_filter(request)
        return [
            item
            for item in filters
            if request.user.is_superuser
            or not (isinstance(item, tuple) and item[0] == self.owner_path)
        ]

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return ConsoleList

    def has_module_permission(self, request: HttpRequest) -> bool:
        return self.has_view_permission(request)

    def has_view_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return bool(request.user.is_active and request.user.is_staff)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def matches(self, request: HttpRequest, object_id: str | None, **condition: Any) -> bool:
        """Whether a verb makes sense for the row of this page; without a row, whether ever."""
        if object_id is None:
            return True
        rows = self.get_queryset(request)
        return bool(rows.filter(pk=unquote(str(object_id)), **condition).exists())

    def row(self, request: HttpRequest, object_id: str) -> Any:
        """The row of this page, if this person may see it."""
        row = self.get_object(request, unquote(object_id))
        if row is None:
            raise Http404
        return row

    def attempt(
        self, request: HttpRequest, row: Model, sentence: str, verb: Callable[[], Outcome]
    ) -> Outcome | None:
        """Call a service for a row; say and note in the row's history what was done.

        A refusal of the service is shown as its own sentence, and the outcome is None.
        """
        try:
            outcome = verb()
        except self.refusals as error:
            messages.error(request, f"{row}: {error}")
            return None
        self.log_change(request, row, sentence)
        messages.success(request, f"{row}: {sentence}")
        return outcome


def verb(
    label: str,
    *,
    permission: str | None = None,
    icon: str,
    danger: bool = False,
    question: str,
    explanation: str,
    answer: str,
    form_class: type[BaseDialogForm] | None = None,
) -> Callable[[Method], Method]:
    """A button of a page that opens a dialog, whose form then posts to the method.

    ``permission`` names a method ``has_<permission>_permission``, which hides the button too;
    ``answer`` is the dialog's button that goes on, beside its own "Cancel".
    """
    decorate: Callable[[Method], Method] = action(
        description=label,
        permissions=[permission] if permission else None,
        icon=icon,
        variant=ActionVariant.DANGER if danger else ActionVariant.DEFAULT,
        dialog={
            "title": question,
            "description": explanation,
            "form_class": form_class,
            "form_submit_text": answer,
        },
    )
    return decorate


def redirect(request: HttpRequest, url: str) -> HttpResponse:
    """Send the browser to another page, also out of a dialog, whose form htmx has posted."""
    if request.headers.get("HX-Request"):
        return HttpResponse(headers={"HX-Redirect": url})
    return HttpResponseRedirect(url)


def page_url(row: Model) -> str:
    """The admin page of a row."""
    return _url(type(row), "change", quote(row.pk))


def changelist_url(model: type[Model]) -> str:
    """The list of a model's rows."""
    return _url(model, "changelist")


def link(row: Model | None, text: str | None = None) -> SafeString | None:
    """A link to a row's page, or None when there is no row."""
    return link_to(type(row), row.pk, text or str(row)) if row is not None else None


def link_to(model: type[Model], pk: int | str, text: str) -> SafeString:
    """A link to the page of a row that need not be loaded."""
    return _anchor(_url(model, "change", quote(pk)), text)


def list_link(model: type[Model], text: str, **filters: object) -> SafeString:
    """A link to the list of a model's rows with these filters set."""
    return _anchor(f"{changelist_url(model)}?{urlencode(filters)}", text)


def _url(model: type[Model], page: str, *args: str) -> str:
    return reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_{page}", args=args)


def _anchor(url: str, text: str) -> SafeString:
    return format_html('<a href="{}" class="text-link">{}</a>', url, text)


def state_label(state: str) -> SafeString:
    """A state in its colour."""
    return render_to_string(
        "unfold/helpers/label.html", {"text": state, "variant": STATE_VARIANTS.get(state)}
    )


def one_line(text: str) -> SafeString:
    """Text cut to the width of its column, whole for who points at it."""
    return format_html('<span class="console-line" title="{}">{}</span>', text, text)


def preformatted(text: str) -> SafeString:
    """Text as it stands, escaped, wrapped where it is wide."""
    return format_html('<pre class="console-text">{}</pre>', text)


def moment(value: datetime | None) -> SafeString | None:
    """``6 min ago`` or ``in 29 d``, with the exact time for who points at it."""
    if value is None:
        return None
    seconds = round((timezone.now() - value).total_seconds())
    size, unit = next((size, unit) for size, unit in UNITS if abs(seconds) >= size or size == 1)
    count = f"{abs(seconds) // size} {unit}"
    return format_html(
        '<time class="whitespace-nowrap" title="{}">{}</time>',
        f"{timezone.localtime(value):%Y-%m-%d %H:%M:%S %Z}",
        f"{count} ago" if seconds >= 0 else f"in {count}",
    )


def duration(value: timedelta | None) -> str | None:
    """A length of time with two significant units: ``41 ms``, ``3.2 s``, ``2 min 5 s``."""
    if value is None:
        return None
    seconds = value.total_seconds()
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    (size, unit), (smaller_size, smaller) = next(
        pair for pair in pairwise(UNITS) if whole >= pair[0][0]
    )
    return f"{whole // size} {unit} {whole % size // smaller_size} {smaller}"


def line_chart(labels: Sequence[object], values: Sequence[float | None], *, name: str) -> str:
    """The data of unfold's line chart, as JSON; None leaves a gap."""
    return _chart(
        labels,
        [
            {
                "label": name,
                "data": [None if value is None else float(f"{value:.4g}") for value in values],
                "borderColor": "var(--color-primary-500)",
                "backgroundColor": "var(--color-primary-500)",
                "spanGaps": True,
            }
        ],
    )


def bar_chart(labels: Sequence[object], bars: Mapping[str, tuple[Sequence[int], str]]) -> str:
    """The data of unfold's bar chart, as JSON: name to values and CSS colour, stacked."""
    return _chart(
        labels,
        [
            {
                "label": name,
                "data": [value or None for value in values],  # a zero would still draw its border
                "backgroundColor": colour,
                "borderRadius": 0,
                "stack": "all",
                "maxBarThickness": 16,
            }
            for name, (values, colour) in bars.items()
        ],
    )


def _chart(labels: Sequence[object], datasets: Sequence[Mapping[str, object]]) -> str:
    axis = {"displayYAxis": True, "maxTicksXLimit": 12}
    return json.dumps(
        {"labels": list(labels), "datasets": [{**dataset, **axis} for dataset in datasets]}
    )
