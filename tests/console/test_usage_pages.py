"""Usage and storage in the console: the sums, whose they are, and deleting several checkpoints."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.template.defaultfilters import filesizeformat
from django.test import Client
from django.test.utils import CaptureQueriesContext
from pytest_django import Settings

from training.models import AuditEvent, Checkpoint, DailyUsage, Snapshot

USAGE = "/admin/training/dailyusage/"
STORAGE = "/admin/training/checkpoint/storage/"
CHECKPOINTS = "/admin/training/checkpoint/"

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


def test_storage_adds_up_what_is_stored(
    console: Client, staff: User, trained: Make, browser: Browser
) -> None:
    mine = trained(staff, name="mine")
    checkpoint = mine.run.checkpoints.get()
    Checkpoint.objects.filter(pk=checkpoint.pk).update(size_bytes=5 * 2**30)
    Snapshot.objects.filter(run=mine.run).delete()
    Snapshot.objects.create(
        run=mine.run, seq_id=9, step=1, directory="x", size_bytes=2**30, write_seconds=1, epoch=1
    )
    for page in (text(console, STORAGE), text(browser(staff), STORAGE)):
        assert "5.0 GB" in page
        assert "1.0 GB" in page
        assert "6.0 GB" in page
        assert "mine" in page
    assert "futures_future" in text(console, STORAGE)
    assert "futures_future" not in text(browser(staff), STORAGE)


@pytest.mark.parametrize("url", [USAGE, STORAGE])
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


def delete(client: Client, *checkpoints: Checkpoint, **more: str) -> Any:
    chosen = [str(checkpoint.pk) for checkpoint in checkpoints]
    body = {"action": "delete_selected_checkpoints", "_selected_action": chosen, **more}
    return client.post(CHECKPOINTS, body)


def test_chosen_checkpoints_are_deleted_after_a_page_with_the_sum(
    console: Client, staff: User, trained: Make, superuser: User, settings: Settings
) -> None:
    one, two, kept = (trained(staff).run.checkpoints.get() for _ in range(3))
    Checkpoint.objects.filter(pk=one.pk).update(size_bytes=3 * 2**20, public=True)
    Checkpoint.objects.filter(pk=two.pk).update(size_bytes=4 * 2**20)

    page = delete(console, one, two).content.decode()

    assert f"free <strong>{filesizeformat(7 * 2**20)}</strong>" in page
    assert "1 of them is published" in page
    assert Checkpoint.objects.count() == 3, "not yet"

    answer = delete(console, one, two, confirmed="yes")

    assert answer.status_code == 302
    assert list(Checkpoint.objects.all()) == [kept]
    assert not Path(settings.DATA_DIR, one.directory).exists()
    assert Path(settings.DATA_DIR, kept.directory).exists()
    events = AuditEvent.objects.filter(event="checkpoint_delete")
    assert [event.actor for event in events] == [superuser, superuser]
    assert "2 checkpoints deleted, 7.0" in text(console, CHECKPOINTS)


def test_others_checkpoints_cannot_be_chosen(
    staff: User, trained: Make, browser: Browser, user_factory: Any
) -> None:
    theirs = trained(user_factory()).run.checkpoints.get()
    mine = trained(staff).run.checkpoints.get()
    delete(browser(staff), theirs, mine, confirmed="yes")
    assert list(Checkpoint.objects.all()) == [theirs]
