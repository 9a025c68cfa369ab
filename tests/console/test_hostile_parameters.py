"""Every page of the admin, asked with impossible ids and parameters: never a server error.

Some of the cases with the suite; ``HOSTILE=all python -m pytest tests/console -k impossible`` runs
them all.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from django.contrib import admin
from django.contrib.auth.models import User
from django.db import transaction
from django.db.models import Model
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver

from tests.console.conftest import list_page

WHOLE = os.environ.get("HOSTILE") == "all"
SLICE = 60
"""The number of cases of each kind in the suite."""

VALUES = (
    "",
    "x",
    "a\0b",
    "-1",
    "1.5",
    "nan",
    str(2**64),
    "9" * 5000,
    "\u0663",  # a digit that is not ASCII
    "\ud800",
    "%",
    "0001-01-01",
    "9999-12-31",
    "99999-99-99",
    "a,b",
)
PARAMETERS = (
    "p",
    "o",
    "q",
    "all",
    "e",
    "page",
    "_popup",
    "_to_field",
    "_changelist_filters",
    "next",
)
LOOKUPS = (
    "",
    "__exact",
    "__gte",
    "__isnull",
    "__in",
    "__year",
    "__range",
    "__id__exact",
    "_from",
    "_to",
    "_from_0",
    "_to_0",
)


def encoded(**query: str) -> str:
    return urlencode(query, errors="surrogatepass")


def routes(resolver: Any, prefix: str = "/") -> Iterator[str]:
    """The address of every page; patterns of the admin's own catch-alls are none."""
    for pattern in resolver.url_patterns:
        route = prefix + str(pattern.pattern)
        if isinstance(pattern, URLResolver):
            yield from routes(pattern, route)
        elif isinstance(pattern, URLPattern) and "(" not in route and "logout" not in route:
            yield route


PAGES = [route for route in routes(get_resolver()) if route.startswith("/admin")]


def of_rows() -> Iterator[str]:
    """Pages of rows that cannot be."""
    for page in PAGES:
        for value in VALUES:
            if "<" in page:
                yield filled(page, quote(value, safe="", errors="surrogatepass"))


def filled(route: str, part: str) -> str:
    while "<" in route:
        begin, _, rest = route.partition("<")
        route = begin + part + rest.partition(">")[2]
    return route


def of_parameters() -> Iterator[str]:
    """Pages asked for in ways that make no sense; the search needs something to look for."""
    for page in PAGES:
        for name in PARAMETERS:
            for value in VALUES:
                if "<" not in page:
                    yield f"{page}?{encoded(s='run', **{name: value})}"


def of_lookups() -> Iterator[str]:
    """Lists filtered by what cannot be compared."""
    for model in admin.site._registry:
        for field in model._meta.get_fields():
            for lookup in LOOKUPS:
                for value in VALUES:
                    yield f"{list_page(model)}?{encoded(**{field.name + lookup: value})}"


def of_choices() -> Iterator[str]:
    """The requests of the filters' choosers."""
    for value in VALUES:
        known = {"app_label": "training", "model_name": "run", "field_name": "owner"}
        for name in known:
            yield f"/admin/autocomplete/?{encoded(term='x', **{**known, name: value})}"
        for name in ("term", "page"):
            yield f"/admin/autocomplete/?{encoded(**known, **{name: value})}"


# Django takes a date in an address for one of the server's time zone, and warns about it.
@pytest.mark.filterwarnings("ignore:DateTimeField .* received a naive datetime:RuntimeWarning")
@pytest.mark.parametrize("cases", [of_rows, of_parameters, of_lookups, of_choices])
def test_impossible_addresses_are_no_server_errors(
    trained: Callable[..., SimpleNamespace],
    superuser: User,
    cases: Callable[[], Iterator[str]],
) -> None:
    trained(superuser)
    client = Client(raise_request_exception=False)
    client.force_login(superuser)
    addresses = list(cases())
    if not WHOLE:
        addresses = random.Random(3).sample(addresses, min(SLICE, len(addresses)))  # noqa: S311
    wrong = []
    for address in addresses:
        with transaction.atomic():  # a database's refusal ends no more than this
            answer = client.get(address)
            transaction.set_rollback(True)
        if answer.status_code >= 500:
            wrong.append((address[:200], repr(answer.exc_info[1])[:200]))  # type: ignore[attr-defined]
    print(f"{len(addresses)} addresses")  # noqa: T201

    assert not wrong, f"{len(wrong)} of {len(addresses)}\n" + "\n".join(map(str, wrong[:40]))


KNOWN: list[tuple[type[Model], str]] = [
    (model, query)
    for model in admin.site._registry
    for query in ("id__range=1,2,3", "id__in=\0", "pk__in=a", "created_at__year=99999999999")
]


@pytest.mark.parametrize(("model", "query"), KNOWN)
def test_a_list_with_a_filter_that_cannot_be_asked_says_so(
    console: Client, model: type[Model], query: str
) -> None:
    with transaction.atomic():
        answer = console.get(f"{list_page(model)}?{query}")
        transaction.set_rollback(True)

    assert answer.status_code in (200, 302, 400)


@pytest.mark.parametrize(("page", "status"), [("x", 404), ("99", 404), ("1", 200)])
def test_a_page_of_the_search_that_is_none_is_a_404(
    console: Client, page: str, status: int
) -> None:
    assert console.get(f"/admin/search/?s=run&page={page}").status_code == status


FORMS = {
    "/admin/login/": ("username", "password", "next"),
    "/admin/password_change/": ("old_password", "new_password1", "new_password2"),
    "/admin/auth/user/add/": ("username", "password1", "password2", "usable_password", "email"),
    "/admin/django_q/schedule/add/": (
        *("name", "func", "hook", "args", "kwargs", "schedule_type", "minutes", "repeats"),
        *("next_run_0", "next_run_1", "cron", "cluster", "intended_date_kwarg"),
    ),
    "/admin/tinkerapi/apikey/new_key/": ("user", "name", "expires_in_days"),
    "/admin/futures/future/": ("action", "_selected_action", "select_across", "index"),
    "/admin/tinkerapi/apikey/": ("action", "_selected_action", "select_across", "index"),
    "/admin/auth/user/": ("action", "_selected_action", "select_across", "index", "form-0-id"),
}
ACTIONS = {"action": "delete_selected", "_selected_action": "1", "index": "0"}


def test_impossible_values_in_forms_are_no_server_errors(
    trained: Callable[..., SimpleNamespace], superuser: User
) -> None:
    trained(superuser)
    client = Client(raise_request_exception=False)
    client.force_login(superuser)
    posts = [
        (page, name, value) for page, names in FORMS.items() for name in names for value in VALUES
    ]
    if not WHOLE:
        posts = random.Random(3).sample(posts, SLICE)  # noqa: S311
    wrong = []
    for page, name, value in posts:
        good = dict.fromkeys(FORMS[page], "1") | {
            k: v for k, v in ACTIONS.items() if k in FORMS[page]
        }
        body = encoded(**{**good, name: value})
        with transaction.atomic():
            answer = client.post(page, body, content_type="application/x-www-form-urlencoded")
            transaction.set_rollback(True)
        if answer.status_code >= 500:
            wrong.append((page, name, value[:40], repr(answer.exc_info[1])[:200]))  # type: ignore[attr-defined]

    assert not wrong, f"{len(wrong)} of {len(posts)}\n" + "\n".join(map(str, wrong[:40]))
