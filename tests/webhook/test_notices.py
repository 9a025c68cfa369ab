"""Which events are noticed, and when a problem begins and is over."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse
from django.utils import timezone
from pytest_django import Settings

from futures.models import Worker
from tests.base_models import base_model_configs
from tests.webhook.conftest import SECRET, Receiver, pauses_end
from tinkerapi.config.webhook import DEFAULT_EVENTS, WebhookConfig
from tinkerapi.deliveries import CONNECTED
from tinkerapi.models import Delivery
from tinkerapi.server import doctor
from tinkerapi.server.doctor import Verdict
from tinkerapi.server.last_backup import last_backup_record
from tinkerapi.webhook.notices import STEADY_SECONDS
from tinkerapi.webhook.sender import WebhookSender
from training.audit import audit_login
from training.base_models import base_model_get

Senders = Callable[..., WebhookSender]


class Clock:
    """A clock that stands still until the test moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def life(db: None) -> Callable[..., Worker]:
    def make(state: str, **fields: Any) -> Worker:
        queue = base_model_get(None).queue
        return Worker.objects.create(queue=queue, state=state, hostname="h", pid=1, **fields)

    return make


def stored(event: str) -> list[tuple[str, str]]:
    rows = Delivery.objects.filter(event=event).order_by("pk")
    return list(rows.values_list("status", "text"))


def later(sender: WebhookSender, clock: Clock, seconds: float = STEADY_SECONDS) -> None:
    """Two looks, so many seconds apart."""
    sender.notice()
    clock.now += seconds
    sender.notice()


def test_a_worker_that_was_lost_and_its_successor_are_noticed_once(
    sender_of: Senders, life: Callable[..., Worker]
) -> None:
    sender = sender_of("http://127.0.0.1:1/", events=("worker_lost", "worker_started"))
    sender.notice()
    lost = life("lost", stopped_at=timezone.now())
    life("live")
    for _ in range(2):
        sender.notice()
    sender_of("http://127.0.0.1:1/", events=("worker_lost", "worker_started")).notice()

    [(status, text)] = stored("worker_lost")
    assert status == "happened"
    assert text.startswith(f"worker #{lost.pk} of ")
    assert len(stored("worker_started")) == 2


def test_events_before_the_receiver_was_set_are_not_sent(
    sender_of: Senders, life: Callable[..., Worker]
) -> None:
    before = timezone.now() - timedelta(minutes=1)
    life("lost", started_at=before, stopped_at=before)
    sender_of("http://127.0.0.1:1/").notice()

    assert stored("worker_lost") == []


def test_what_was_not_chosen_is_not_stored(sender_of: Senders, life: Callable[..., Worker]) -> None:
    sender = sender_of("http://127.0.0.1:1/", events=("worker_started",))
    sender.notice()
    life("lost", stopped_at=timezone.now())
    last_backup_record(timezone.now())
    sender.notice()

    assert set(Delivery.objects.values_list("event", flat=True)) == {CONNECTED, "worker_started"}


def test_failed_logins_of_one_name_are_one_event_in_an_hour(
    sender_of: Senders, django_user_model: type[User]
) -> None:
    people = [django_user_model.objects.create(username=name) for name in ("ada", "bob")]
    sender = sender_of("http://127.0.0.1:1/", events=("login_failed",))
    sender.notice()
    hours = set()
    for number in range(5):
        hours.add(f"{timezone.now():%H}")
        for person in people:
            audit_login("failed", username=person.username, address=f"10.0.0.{number}")
        audit_login("failed", username=f"guess-{number}", address=f"10.0.0.{number}")
        sender.notice()
    hours.add(f"{timezone.now():%H}")

    assert 3 <= len(stored("login_failed")) <= 3 * len(hours)


def test_an_outage_begins_and_ends_only_if_it_lasts(
    sender_of: Senders, life: Callable[..., Worker], clock: Clock
) -> None:
    sender = sender_of("http://127.0.0.1:1/", events=("worker_missing",), clock=clock)
    name = base_model_get(None).name
    later(sender, clock, STEADY_SECONDS - 1)
    assert stored("worker_missing") == []
    worker = life("live")
    later(sender, clock)
    assert stored("worker_missing") == []

    Worker.objects.update(state="stopped", stopped_at=timezone.now())
    later(sender, clock)
    later(sender, clock)
    [(status, text)] = stored("worker_missing")
    assert (status, text.split(" ")[0]) == ("began", f"{name}:")

    # A new process knows what was said, and says only what is new.
    sender = sender_of("http://127.0.0.1:1/", events=("worker_missing",), clock=clock)
    later(sender, clock)
    assert len(stored("worker_missing")) == 1
    Worker.objects.filter(pk=worker.pk).update(state="live", stopped_at=None)
    later(sender, clock)
    later(sender, clock)
    assert stored("worker_missing")[1:] == [("over", f"Over: {text}")]


def test_a_base_model_of_a_long_name_has_one_outage(
    sender_of: Senders, clock: Clock, settings: Settings
) -> None:
    settings.BASE_MODELS = base_model_configs("lab/" + "x" * 250)
    sender = sender_of("http://127.0.0.1:1/", events=("worker_missing",), clock=clock)
    for _ in range(3):
        later(sender, clock)

    assert [status for status, _ in stored("worker_missing")] == ["began"]


def test_a_disk_that_fills_up_is_low_then_full_then_neither(
    sender_of: Senders, life: Callable[..., Worker], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    life("live")
    sender = sender_of("http://127.0.0.1:1/", events=("disk_low", "disk_full"), clock=clock)
    for free in (50, 9, 2, 9, 50):
        usage = SimpleNamespace(total=100 * 2**30, free=free * 2**30, used=0)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        later(sender, clock)

    rows = Delivery.objects.exclude(event=CONNECTED).order_by("pk")
    assert list(rows.values_list("event", "status")) == [
        ("disk_low", "began"),
        ("disk_full", "began"),
        ("disk_full", "over"),
        ("disk_low", "over"),
    ]


def test_a_backup_is_noticed(sender_of: Senders) -> None:
    sender = sender_of("http://127.0.0.1:1/", events=(*DEFAULT_EVENTS, "backup_made"))
    sender.notice()
    last_backup_record(timezone.now() + timedelta(seconds=1))
    sender.notice()

    assert len(stored("backup_made")) == 1


def test_the_console_and_the_doctor_say_what_the_receiver_said(
    receiver: Receiver,
    sender_of: Senders,
    settings: Settings,
    client: Client,
    django_user_model: type[User],
    life: Callable[..., Worker],
) -> None:
    client.force_login(
        django_user_model.objects.create(username="root", is_staff=True, is_superuser=True)
    )
    life("live")
    settings.WEBHOOK = None
    assert list(doctor.check_webhook()) == []
    settings.WEBHOOK = WebhookConfig(url=receiver.url, secret=SECRET, events=DEFAULT_EVENTS)
    [finding] = doctor.check_webhook()
    assert finding.verdict is Verdict.OFF

    receiver.statuses = [503]
    sender_of(receiver.url).tick()
    [problem] = client.get(reverse("admin:index")).context["problems"]
    assert "did not take the last event" in problem.text
    assert "status 503" in problem.text
    assert "private" not in problem.text
    assert "status 503" in client.get(problem.url).content.decode()
    [finding] = doctor.check_webhook()
    assert (finding.verdict, "private" in finding.detail) == (Verdict.FAILED, False)

    pauses_end()
    sender_of(receiver.url).tick()
    assert client.get(reverse("admin:index")).context["problems"] == []
    page = client.get(reverse("admin:tinkerapi_delivery_change", args=[Delivery.objects.get().pk]))
    assert "delivered" in page.content.decode()
    [finding] = doctor.check_webhook()
    assert finding.verdict is Verdict.OK
