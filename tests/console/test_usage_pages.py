"""Usage in the console: the sums, and whose they are."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from pytest_django import Settings

from training.models import DailyUsage

USAGE = "/admin/training/dailyusage/"

Make = Callable[..., SimpleNamespace]
Browser = Callable[[User], Client]


def text(client: Client, url: str) -> str:
    page = client.get(url)
    assert page.status_code == 200
    return page.content.decode().replace("\xa0", " ")


def test_usage_shows_a_superuser_everybody_and_others_themselves(
    console: Client, staff: User, trained: Make, browser: Browser, user_factory: Any
) -> None:
    other = user_factory()
    theirs, mine = trained(other, name="theirs"), trained(staff, name="mine")
    tokens = sum(row.tokens for row in DailyUsage.objects.filter(work="training"))

    everybody, own = text(console, USAGE), text(browser(staff), USAGE)

    assert f"{tokens:,}" in everybody
    assert theirs.run.name in everybody
    assert mine.run.name in everybody
    assert other.username in everybody
    assert mine.run.name in own
    assert theirs.run.name not in own
    assert other.username not in own


def test_usage_has_a_price_once_the_operator_sets_one(
    console: Client, staff: User, trained: Make, settings: Settings
) -> None:
    trained(staff)
    DailyUsage.objects.filter(work="training").update(seconds=7200)
    DailyUsage.objects.exclude(work="training").update(seconds=0)
    assert "Cost" not in text(console, USAGE)
    settings.WORKER_HOUR_CENTS = 250
    page = text(console, USAGE)
    assert "$5.00" in page
    assert "2.0 h" in page


def test_the_csv_has_every_line(console: Client, staff: User, trained: Make) -> None:
    trained(staff)
    page = console.get(USAGE, {"format": "csv"})
    rows = list(csv.DictReader(io.StringIO(page.content.decode())))
    assert page["Content-Type"].startswith("text/csv")
    assert len(rows) == DailyUsage.objects.count() > 0
    assert sum(int(row["tokens"]) for row in rows) == sum(
        row.tokens for row in DailyUsage.objects.all()
    )


@pytest.mark.parametrize("days", ["0", "-1", "7;", "1e9", "\0", "\uff19"])
def test_an_unknown_period_is_the_usual_one(console: Client, days: str) -> None:
    assert text(console, f"{USAGE}?days={days}").count('aria-current="page">30 days') == 1


def test_the_limit_of_a_day_is_shown(
    staff: User, trained: Make, browser: Browser, settings: Settings
) -> None:
    settings.USER_TOKENS_PER_DAY = 100_000
    trained(staff)
    used = sum(row.tokens for row in DailyUsage.objects.all())
    assert f"You today (UTC): {used:,} of 100,000 tokens" in text(browser(staff), USAGE)


@pytest.mark.parametrize("url", [USAGE])
def test_the_queries_do_not_grow_with_the_rows(
    console: Client, staff: User, trained: Make, url: str
) -> None:
    def queries() -> int:
        with CaptureQueriesContext(
            connection,
        ) as captured:
            text(console, url)
        return len(captured)

    trained(staff)
    text(console, url)
    few = queries()
    for _ in range(3):
        trained(staff)
    assert queries() == few
