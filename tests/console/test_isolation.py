"""Every admin class says whose rows it shows; the tables here fail for one that is new."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from django.contrib import admin
from django.contrib.admin.utils import quote
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse
from django_q.models import Failure, OrmQ, Schedule, Success

from futures.models import Worker
from tests.console.conftest import list_page
from tests.isolation.conftest import OWNED
from tinkerapi.models import Delivery
from tinkerapi.services import api_key_create
from training.models import (
    AuditEvent,
    ClientMetrics,
    CustomLoss,
    RecordedSample,
    RenderedData,
    Rollout,
    SampledStep,
)

SHARED = {Worker}
"""Staff may see them: test_access says what of them they see."""
UNLISTED = {ClientMetrics, CustomLoss, RecordedSample, RenderedData, Rollout, SampledStep}
"""Have no pages."""
SUPERUSERS = {User, OrmQ, Schedule, Success, Failure, AuditEvent, Delivery}


def test_every_admin_class_is_classified() -> None:
    classified = (OWNED.keys() - UNLISTED) | SHARED | SUPERUSERS
    assert set(admin.site._registry) == classified


def pages() -> list[str]:
    """Every address of the admin that takes no id."""
    found = [reverse("admin:index")]
    for model in admin.site._registry:
        found.append(list_page(model))
    return found


def test_no_page_opens_without_logging_in_as_staff(
    user_factory: Callable[..., User],
    browser: Callable[[User], Client],
    trained: Callable[..., SimpleNamespace],
) -> None:
    owner = user_factory()
    traces = trained(owner, name="theirs-only")
    rows = [traces.run, traces.sample, traces.checkpoint, traces.session, traces.api_key]
    for client in (Client(), browser(owner)):
        for page in pages():
            assert client.get(page).status_code == 302
        for row in rows:
            for pattern in admin.site._registry[type(row)].get_urls():
                if pattern.name is None:  # a page's old address, which redirects to it
                    continue
                ids = dict.fromkeys(pattern.pattern.converters, quote(row.pk))
                address = reverse(f"admin:{pattern.name}", kwargs=ids)
                for ask in (client.get, client.post):
                    answer = ask(address)
                    assert answer.status_code in (302, 403, 405), (address, answer)
                    assert "theirs-only" not in answer.content.decode()


def test_what_is_for_superusers_opens_for_nobody_else(
    staff: User, browser: Callable[[User], Client], console: Client
) -> None:
    for model in SUPERUSERS:
        assert browser(staff).get(list_page(model)).status_code == 403
        assert console.get(list_page(model)).status_code == 200


@pytest.mark.parametrize("flag", ["is_staff", "is_superuser"])
def test_an_api_key_does_not_log_in_to_the_admin(
    user_factory: Callable[..., User],
    flag: str,
) -> None:
    user = user_factory(**{"is_staff": True, flag: True})
    _, key = api_key_create(user=user, name="k")
    answer = Client(headers={"X-API-Key": key}).get(reverse("admin:index"))
    assert answer.status_code == 302
