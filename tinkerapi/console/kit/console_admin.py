"""The admin as a console: read-only pages of rows, whose few actions call services.

Nothing is added, edited or deleted through a form. Superusers see every row; other staff
users see the rows that they own, without needing permissions for them. An action needs confirmation
in a dialog and is sent as a POST, so no link on another page can trigger it. Lists stay cheap on a
table of millions: no full count, sorting only by an index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

from django.contrib import messages
from django.contrib.admin import ShowFacets
from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.admin.utils import unquote
from django.core.paginator import Paginator
from django.db import DataError, ProgrammingError
from django.db.models import Model, QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.shortcuts import render
from django.utils.functional import cached_property
from unfold.admin import ModelAdmin
from unfold.decorators import action
from unfold.enums import ActionVariant
from unfold.forms import BaseDialogForm
from unfold.views import ChangeList

from futures.errors import FutureError

Outcome = TypeVar("Outcome")
Method = TypeVar("Method", bound=Callable[..., HttpResponse])

COUNT_LIMIT = 10_000
"""Rows that a list counts and pages through; further rows are found by search and filters."""


UNANSWERABLE = (DataError, ProgrammingError, IndexError, OverflowError, TypeError, ValueError)
"""Errors of a query with hand-written conditions from an address."""


class BoundedPaginator(Paginator):  # type: ignore[type-arg]  # no subscript at run time
    """Pages over the first ``COUNT_LIMIT`` rows, counting no further."""

    @cached_property
    def count(self) -> int:
        rows: QuerySet[Any] = self.object_list  # type: ignore[assignment]  # the admin's own
        return rows.order_by().values("pk")[:COUNT_LIMIT].count()


class CarefulList(ChangeList):  # type: ignore[misc]  # unfold has no type information
    """A list that handles filters that cannot be made into a query: years, ranges, ids.

    Django looks for such mistakes when it composes the query, but most appear when it runs. They
    are then handled like any mistake in a list's address: the page shows the error and no rows.
    """

    def get_results(self, request: HttpRequest) -> None:
        try:
            super().get_results(request)
        except UNANSWERABLE as error:
            raise IncorrectLookupParameters(error) from error


class ConsoleList(CarefulList):
    """A list that offers "show all" only if a search or a filter hides rows."""

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        if not self.query and not self.has_active_filters:
            self.full_result_count = self.result_count


class ConsoleAdmin(ModelAdmin):  # type: ignore[misc]  # unfold has no type information
    """Read-only pages for the rows of one model."""

    owner_path: ClassVar[str | None] = "owner"
    """Lookup from the row to the user who owns it; None if rows have no owner."""
    refusals: ClassVar[tuple[type[Exception], ...]] = (FutureError,)
    """Errors of services whose message is shown to the person."""

    paginator = BoundedPaginator
    show_full_result_count = False
    show_facets = ShowFacets.NEVER  # each facet would count the whole table
    list_per_page = 50
    list_disable_select_all = True
    list_horizontal_scrollbar_top = True
    show_add_link = False

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows: QuerySet[Any] = super().get_queryset(request)
        if self.owner_path is None or request.user.is_superuser:
            return rows
        return rows.filter(**{self.owner_path: request.user.pk})

    def get_list_display(self, request: HttpRequest) -> list[str]:
        """Show the owner to superusers only; others see only their own rows."""
        names = super().get_list_display(request)
        return [name for name in names if name != "owner_link" or request.user.is_superuser]

    def get_list_filter(self, request: HttpRequest) -> list[Any]:
        """No filter by user, because it would show the other users' names."""
        filters = super().get_list_filter(request)
        return [
            item
            for item in filters
            if request.user.is_superuser
            or not (isinstance(item, tuple) and item[0] == self.owner_path)
        ]

    def get_fieldsets(self, request: HttpRequest, obj: Model | None = None) -> Any:
        """Without the owner field for users who see only their own rows."""
        fieldsets = super().get_fieldsets(request, obj)
        if request.user.is_superuser:
            return fieldsets
        return [
            (name, {**options, "fields": [_without_owner(line) for line in options["fields"]]})
            for name, options in fieldsets
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
        """Whether an action is possible for the row of this page; without a row, whether it ever
        is."""
        if object_id is None:
            return True
        # Several buttons of a page ask the same.
        known: dict[Any, bool] = vars(request).setdefault("console_matches", {})
        key = (type(self), object_id, repr(sorted(condition.items())))
        if key not in known:
            rows = self.get_queryset(request)
            try:
                found = rows.filter(pk=unquote(str(object_id)), **condition).exists()
            except (DataError, ValueError):  # an id that no row can have
                found = False
            known[key] = bool(found)
        return known[key]

    def row(self, request: HttpRequest, object_id: str) -> Any:
        """The row of this page, if this person may see it."""
        row = self.get_object(request, unquote(object_id))
        if row is None:
            raise Http404
        return row

    def attempt(
        self, request: HttpRequest, row: Model, sentence: str, verb: Callable[[], Outcome]
    ) -> Outcome | None:
        """Call a service for a row; show the result and record it in the row's history.

        The message of a service's error is shown, and the result is None.
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
    ``answer`` is the label of the dialog's confirm button, beside its "Cancel".
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


def link_button(
    label: str, *, permission: str | None = None, icon: str
) -> Callable[[Method], Method]:
    """A button of a page that only leads to another page; see ``verb`` for ``permission``."""
    decorate: Callable[[Method], Method] = action(
        description=label, permissions=[permission] if permission else None, icon=icon
    )
    return decorate


def shown_once(request: HttpRequest, template: str, context: dict[str, Any]) -> HttpResponse:
    """A secret in place of the dialog, whose form could otherwise be sent again."""
    response = render(request, template, context)
    response["HX-Retarget"] = "#modal-content"
    response["HX-Reselect"] = "#dialog"
    response["HX-Reswap"] = "innerHTML"
    return response


def redirect(request: HttpRequest, url: str) -> HttpResponse:
    """Send the browser to another page, even from a dialog, whose form htmx has posted."""
    if request.headers.get("HX-Request"):
        return HttpResponse(headers={"HX-Redirect": url})
    return HttpResponseRedirect(url)


def _without_owner(line: str | Sequence[str]) -> str | Sequence[str]:
    """A line of a page's fields, without ``owner_link``."""
    return line if isinstance(line, str) else [name for name in line if name != "owner_link"]
