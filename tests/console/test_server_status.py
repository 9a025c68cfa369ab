"""The dashboard's banner and its feed of events."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse
from django.utils import timezone
from pytest_django import Settings

from futures.models import Worker
from tinkerapi.server.last_backup import last_backup_record
from training.audit import audit_login
from training.base_models import base_model_get

URL = reverse("admin:index")


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, settings: Settings) -> Path:
    settings.DATA_DIR = tmp_path
    return tmp_path


@pytest.fixture
def life(db: None) -> Callable[..., Worker]:
    """``life("live", age=3)``: a worker of the served base model; ages in minutes."""

    def make(state: str, *, age: float = 0, **fields: Any) -> Worker:
        begin = timezone.now() - timedelta(minutes=age)
        return Worker.objects.create(
            queue=base_model_get(None).queue,
            state=state,
            hostname="h",
            pid=1,
            started_at=begin,
            **fields,
        )

    return make


def banner(client: Client) -> list[tuple[bool, str]]:
    context = client.get(URL).context
    return [(problem.is_alarm, problem.text) for problem in context["problems"]]


def test_a_server_without_problems_has_no_banner(
    console: Client, life: Callable[..., Worker]
) -> None:
    life("live")

    assert banner(console) == []
    assert "console-problems" not in console.get(URL).content.decode()


@pytest.mark.parametrize(
    ("lives", "alarm", "text"),
    [
        ([], True, "no worker has served it yet; requests wait"),
        (["starting"], False, "the worker is starting"),
        (["stopped"], True, "the worker stopped"),
        (["lost"], True, "the worker was lost"),
        (["lost", "starting"], False, "the worker is starting"),
    ],
)
def test_a_base_model_without_a_worker_is_named(
    console: Client, life: Callable[..., Worker], lives: list[str], alarm: bool, text: str
) -> None:
    for state in lives:
        life(state, **({} if state == "starting" else {"stopped_at": timezone.now()}))

    [(is_alarm, shown)] = banner(console)

    assert is_alarm is alarm
    assert shown.startswith(f"{base_model_get(None).name}: {text}")


def test_a_worker_that_does_not_answer_is_named(
    console: Client, life: Callable[..., Worker]
) -> None:
    worker = life("live", age=10, heartbeat_at=timezone.now() - timedelta(minutes=2))

    [(is_alarm, text)] = banner(console)

    assert is_alarm
    assert f"worker #{worker.pk} does not answer; last heard of 2 min ago" in text


@pytest.mark.parametrize(("free", "shown"), [(11, None), (9, False), (2, True)])
def test_a_disk_that_is_nearly_full_is_a_warning_then_an_alarm(
    console: Client,
    life: Callable[..., Worker],
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    shown: bool | None,
) -> None:
    life("live")
    usage = SimpleNamespace(total=100 * 2**30, free=free * 2**30, used=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    found = banner(console)

    assert [is_alarm for is_alarm, _ in found] == ([] if shown is None else [shown])
    assert all(f"{free}.0\xa0GB of 100.0\xa0GB are free" in text for _, text in found)


@pytest.mark.parametrize(
    ("per_day", "forecast", "warns"),
    [
        (0, "", False),
        (2, "Full in about 10 days at the growth of the last days", False),
        (8, "Full in about 2 days at the growth of the last days", True),
        (40, "Full in about 12 hours at the growth of the last days", True),
    ],
)
def test_the_dashboard_says_when_the_disk_will_be_full(
    console: Client,
    life: Callable[..., Worker],
    data_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    per_day: int,
    forecast: str,
    warns: bool,
) -> None:
    life("live")
    usage = SimpleNamespace(total=100 * 2**30, free=20 * 2**30, used=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    now = timezone.now().timestamp()
    lines = [
        f"{now - hour * 3600:.0f} {round((20 + per_day * hour / 24) * 2**30)}"
        for hour in range(48, -1, -1)
    ]
    (data_dir / "disk_history").write_text("\n".join(lines))

    assert console.get(URL).context["storage"]["forecast"] == forecast
    assert [(alarm, "is full in" in text) for alarm, text in banner(console)] == (
        [(False, True)] if warns else []
    )


def test_an_old_backup_is_a_warning_for_the_operator(
    console: Client, staff: User, browser: Callable[[User], Client], life: Callable[..., Worker]
) -> None:
    life("live")
    for days, warns in ((6, False), (8, True)):
        last_backup_record(timezone.now() - timedelta(days=days))
        expected = [(False, f"The last backup was made {days} d ago.")] if warns else []
        assert banner(console) == expected
    assert banner(browser(staff)) == []


def test_the_feed_tells_a_workers_end_and_who_followed(
    console: Client, life: Callable[..., Worker]
) -> None:
    now = timezone.now()
    lost = life("lost", age=20, stopped_at=now - timedelta(minutes=5, seconds=12))
    next_one = life("live", age=5)
    queue = lost.queue

    texts = [event.text for event in console.get(URL).context["events"]]

    assert texts == [
        f"worker #{next_one.pk} of {queue} started, 12.0 s after #{lost.pk} ended",
        f"worker #{lost.pk} of {queue} was lost after 14 min 48 s",
        f"worker #{lost.pk} of {queue} started",
    ]


def test_failed_logins_are_one_line_for_superusers_only(
    console: Client, superuser: User, staff: User, browser: Callable[[User], Client]
) -> None:
    for _ in range(3):
        audit_login("failed", username=superuser.username, address="10.0.0.7")
    audit_login("failed", username="<i>", address="10.0.0.8")
    last_backup_record(timezone.now() - timedelta(hours=1))

    texts = [event.text for event in console.get(URL).context["events"]]

    assert texts == [
        "a failed login (an unknown name, from 10.0.0.8)",
        f"a failed login ({superuser.username}, from 10.0.0.7), 3 times",
        "a backup was complete",
    ]
    assert browser(staff).get(URL).context["events"] == []
