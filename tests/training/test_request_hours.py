"""Requests per hour: exact at any time, and an hour that is over is counted once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from futures.models import Future
from training.models import CountedHour
from training.request_hours import (
    AT_A_TIME,
    HOUR,
    beginning,
    hours_count,
    requests_by_hour,
    requests_total,
)

Make = Callable[..., Future]


@pytest.fixture
def now() -> datetime:
    return timezone.now()


@pytest.fixture
def owner(db: None) -> User:
    return User.objects.create(username="one")


@pytest.fixture
def make(owner: User) -> Make:
    """``make(age_hours, state)``: a request that was submitted then."""

    def make(age: float, state: str = "ready", *, of: User = owner) -> Future:
        created = timezone.now() - timedelta(hours=age)
        final: dict[str, Any] = {} if state == "pending" else {"finished_at": created}
        if state == "ready":
            final |= {"started_at": created, "result": b"x"}
        if state == "failed":
            final |= {"error": "no", "category": "user"}
        request = {"owner": of, "queue": "q", "kind": "sample", "payload": b"x"}
        return Future.objects.create(
            **request, payload_digest=b"", state=state, created_at=created, **final
        )

    return make


def expected(owner_id: int | None, since: datetime) -> Counter[tuple[datetime, str]]:
    """By the definition: one look at every row."""
    rows = Future.objects.filter(created_at__gte=since)
    rows = rows if owner_id is None else rows.filter(owner_id=owner_id)
    return Counter((beginning(row.created_at), row.state) for row in rows)


def test_the_numbers_are_those_of_the_rows_before_and_after_counting(
    make: Make, owner: User, now: datetime
) -> None:
    other = User.objects.create(username="two")
    for age in (0, 1.5, 2.5, 2.6, 30):
        make(age)
    make(2.7, "failed")
    make(2.7, "failed", of=other)
    make(5.5, "cancelled", of=other)
    make(7.5, "pending", of=other)
    since = beginning(now) - 23 * HOUR
    before = {who: requests_by_hour(who, since=since) for who in (None, owner.pk, other.pk)}

    while hours_count():
        pass

    assert CountedHour.objects.count() > 20
    for who, numbers in before.items():
        assert numbers == dict(expected(who, since))
        assert requests_by_hour(who, since=since) == numbers


def test_the_total_of_all_times_reads_no_owners_numbers(make: Make, owner: User) -> None:
    """A scrape costs the same on a server of one user and of a thousand."""
    other = User.objects.create(username="two")
    for who in (owner, other, other):
        make(2.5, of=who)
    make(5.5, "cancelled", of=other)
    before = requests_total()
    while hours_count():
        pass
    assert CountedHour.objects.exclude(totals={}).exists()
    CountedHour.objects.update(counts={})

    assert requests_total() == before == {"ready": 3, "cancelled": 1}


def test_an_hour_with_an_open_request_is_counted_when_it_is_final(
    make: Make, now: datetime
) -> None:
    waiting = make(7.5, "pending")
    hour = beginning(waiting.created_at)
    while hours_count():
        pass
    assert not CountedHour.objects.filter(hour=hour).exists()

    Future.objects.filter(pk=waiting.pk).update(state="cancelled", finished_at=now)
    assert requests_by_hour(None, since=hour) == {(hour, "cancelled"): 1}
    assert hours_count() == 1
    assert CountedHour.objects.get(hour=hour).counts == {str(waiting.owner_id): {"cancelled": 1}}


def test_the_present_hour_and_one_that_may_still_grow_are_not_counted(
    db: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begins = datetime(2026, 5, 1, 12, tzinfo=timezone.get_default_timezone())
    for minutes, counted in ((59, False), (69, False), (70, True)):
        moment = begins + timedelta(minutes=minutes)
        monkeypatch.setattr("training.request_hours.timezone.now", lambda moment=moment: moment)
        while hours_count():
            pass
        assert CountedHour.objects.filter(hour=begins).exists() is counted


def test_counting_takes_little_at_a_time_and_nothing_when_all_is_counted(db: None) -> None:
    assert hours_count() == AT_A_TIME
    while hours_count():
        pass
    with CaptureQueriesContext(connection) as queries:
        assert hours_count() == 0
    assert len(queries) <= 1
