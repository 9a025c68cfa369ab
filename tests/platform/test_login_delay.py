"""Guessing passwords is slow, and locks nobody out for long."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta

import pytest
from django.contrib.auth.models import User
from django.db import connections
from django.db.models import F
from django.test import Client, RequestFactory
from django.urls import reverse
from django.utils import timezone

from tests.futures.conftest import race
from tinkerapi.login_delay import FORGET, client_address, login_begin, login_succeeded
from tinkerapi.models import FailedLogins
from training.models import AuditEvent

PASSWORD = "correct horse battery"  # noqa: S105

pytestmark = pytest.mark.django_db


def attempts(count: int, username: str = "ada", address: str = "192.0.2.7") -> list[float]:
    return [login_begin(username=username, address=address) for _ in range(count)]


def later(**time: float) -> None:
    """Simulate that this much time has passed."""
    by = timedelta(**time)
    FailedLogins.objects.update(last_at=F("last_at") - by, closed_until=F("closed_until") - by)


def longest_wait() -> float:
    """The delay of the login after the last attempt, in seconds."""
    waits = [row.closed_until - row.last_at for row in FailedLogins.objects.all()]
    return max(waits).total_seconds()


def test_each_failure_after_some_free_ones_doubles_the_wait_up_to_a_minute() -> None:
    assert attempts(6) == [0.0] * 6

    waits = [longest_wait()]
    for _ in range(8):
        later(seconds=waits[-1])
        assert attempts(1) == [0.0]
        waits.append(longest_wait())

    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert 0 < attempts(1)[0] <= 60
    assert longest_wait() == 60, "asking meanwhile does not lengthen it"


def test_what_was_quiet_for_an_hour_is_forgotten() -> None:
    attempts(6)
    later(seconds=FORGET.total_seconds() + 1)
    assert attempts(6) == [0.0] * 6

    later(seconds=2 * FORGET.total_seconds() + 1)
    attempts(1, "bob", "192.0.2.8")
    assert FailedLogins.objects.count() == 3, "and in time its row is gone"


def test_an_address_that_tries_many_names_waits() -> None:
    tried = [login_begin(username=f"user {number}", address="192.0.2.7") for number in range(22)]

    assert tried[:21] == [0.0] * 21
    assert tried[21] > 0
    assert attempts(1, "user 1", "192.0.2.8") == [0.0], "and nobody else does"


def test_a_name_that_many_addresses_try_waits_five_seconds_at_most() -> None:
    def from_new_address(number: int) -> float:
        return login_begin(username="ada", address=f"192.0.2.{number}")

    for number in range(20):
        assert from_new_address(number) == 0.0
        later(seconds=5)
    from_new_address(30)

    assert 4 < from_new_address(31) <= 5


def test_others_attempts_do_not_delay_a_user_at_the_usual_address() -> None:
    ada = User.objects.create_user("ada")
    AuditEvent.objects.create(
        event="login_succeeded", owner=ada, actor=ada, details={"address": "198.51.100.1"}
    )
    for number in range(20):
        login_begin(username="ada", address=f"192.0.2.{number}")
    assert login_begin(username="ada", address="192.0.2.99") > 0

    assert login_begin(username="ada", address="198.51.100.1") == 0.0


def test_a_success_forgets_the_users_failures_and_takes_itself_back() -> None:
    attempts(5)

    for _ in range(50):
        assert attempts(1) == [0.0]
        login_succeeded(username="ada", address="192.0.2.7")


@pytest.mark.django_db(transaction=True)
def test_many_attempts_at_once_are_no_more_than_one_by_one() -> None:
    for _ in range(5):
        login_begin(username="ada", address="192.0.2.7")

    answers = race(*[lambda: login_begin(username="ada", address="192.0.2.7")] * 8)

    assert [answer for answer in answers if isinstance(answer, Exception)] == []
    assert [answer == 0.0 for answer in answers].count(True) == 1
    connections.close_all()


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("", ""),
        ("unix:", "unix:"),
    ],
)
def test_an_address_is_what_one_customer_has(address: str, counted: str) -> None:
    assert client_address(RequestFactory().get("/", REMOTE_ADDR=address)) == counted


@pytest.fixture
def log_in(client: Client) -> Callable[..., str]:
    """``log_in("ada", "secret")``: the page's error, or nothing after a successful login."""

    def post(username: str, password: str) -> str:
        answer = client.post(reverse("admin:login"), {"username": username, "password": password})
        if answer.status_code == 302:
            client.logout()
            return ""
        return str(answer.context["form"].non_field_errors()[0])

    return post


def test_the_page_says_how_long_and_lets_the_right_password_in_after_that(
    log_in: Callable[..., str],
) -> None:
    User.objects.create_superuser("ada", password=PASSWORD)
    for _ in range(6):
        assert log_in("ada", "wrong").startswith("Please enter the correct username and password")

    later(seconds=-30)  # no test is quick enough for the second that it is
    assert re.fullmatch(
        r"Too many logins have failed\. Try again in (30|31) seconds\.", log_in("ada", PASSWORD)
    )

    later(seconds=31)
    assert log_in("ada", PASSWORD) == ""
    assert log_in("ada", "wrong").startswith("Please enter the correct")


def test_a_name_that_does_not_exist_is_told_the_same(log_in: Callable[..., str]) -> None:
    User.objects.create_superuser("ada", password=PASSWORD)

    told = {}
    for name in ("ada", "nobody"):
        told[name] = [log_in(name, "wrong") for _ in range(6)]
        FailedLogins.objects.update(closed_until=timezone.now() + timedelta(seconds=29.9))
        told[name].append(re.sub(r"\d+", "so many", log_in(name, "wrong")))
        FailedLogins.objects.all().delete()

    assert told["ada"] == told["nobody"]
    assert told["ada"][-1].startswith("Too many")


def test_logins_are_in_the_audit_log_without_what_was_typed(log_in: Callable[..., str]) -> None:
    ada = User.objects.create_superuser("ada", password=PASSWORD)
    log_in("ada", "wrong")
    log_in("my password, too early", "wrong")
    log_in("ada", PASSWORD)
    for _ in range(6):
        log_in("ada", "wrong")
    FailedLogins.objects.update(closed_until=timezone.now() + timedelta(seconds=600))
    for _ in range(20):
        log_in("ada", "wrong")

    events = list(AuditEvent.objects.order_by("pk"))
    assert [(event.event, event.actor_id, event.owner_id) for event in events[:3]] == [
        ("login_failed", None, ada.pk),
        ("login_failed", None, None),
        ("login_succeeded", ada.pk, ada.pk),
    ]
    assert events[2].details == {"username": "ada", "address": "127.0.0.1"}
    assert len(events) == 3 + 6, "what waits is not written down"
    assert "too early" not in str([event.details for event in events])


def test_a_login_that_was_slowed_long_ago_is_not_slow_now(log_in: Callable[..., str]) -> None:
    User.objects.create_superuser("ada", password=PASSWORD)
    for _ in range(12):
        log_in("ada", "wrong")
    FailedLogins.objects.update(closed_until=timezone.now(), last_at=timezone.now() - 2 * FORGET)

    assert log_in("ada", PASSWORD) == ""
