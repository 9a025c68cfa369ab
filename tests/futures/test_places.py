"""How many come before a waiting future, and how long that takes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from futures.claiming import future_claim
from futures.models import Future, Worker
from futures.places import future_place, queue_position
from futures.services import future_cancel
from futures.workers import worker_heartbeat, worker_live
from tests.futures.conftest import SubmitFactory, finish

pytestmark = pytest.mark.django_db


def test_the_position_counts_open_futures_of_the_queue_before_it(
    submit: SubmitFactory, worker: Worker
) -> None:
    futures = [submit() for _ in range(4)]
    submit(queue="other")
    assert [queue_position(future) for future in futures] == [0, 1, 2, 3]

    [first] = future_claim(worker=worker, max_futures=1, max_cost=1)
    assert queue_position(futures[3]) == 3
    finish(worker, first)
    cancelled = future_cancel(request_id=futures[1].pk, owner_id=futures[1].owner_id)
    assert queue_position(futures[3]) == 1
    assert queue_position(cancelled) == 0
    assert queue_position(first) == 0


def test_another_owners_many_count_only_as_far_as_they_come_before(
    submit: SubmitFactory, owner_factory: Callable[[], Any]
) -> None:
    for _ in range(20):
        submit()
    other = owner_factory().pk
    own = [submit(owner_id=other) for _ in range(3)]

    assert [queue_position(future) for future in own] == [1, 3, 5]


def test_positions_are_the_order_of_claims(
    submit: SubmitFactory, owner_factory: Callable[[], Any], worker: Worker
) -> None:
    owners = [owner_factory().pk for _ in range(3)]
    futures = [submit(owner_id=owners[turn]) for turn in (0, 0, 0, 0, 1, 1, 2)]
    # Whoever submits last is told exactly; those before may be overtaken by a later owner's first.
    last = futures[-1]
    told = queue_position(last)

    claimed = [
        future_claim(worker=worker, max_futures=1, max_cost=1)[0].pk for _ in range(len(futures))
    ]

    assert claimed.index(last.pk) == told == 2


def test_what_runs_comes_first_whoever_owns_it(
    submit: SubmitFactory, owner_factory: Callable[[], Any], worker: Worker
) -> None:
    for _ in range(5):
        submit()
    future_claim(worker=worker, max_futures=3, max_cost=3)

    assert queue_position(submit(owner_id=owner_factory().pk)) == 3 + 1


def test_no_more_than_a_thousand_are_counted(submit: SubmitFactory) -> None:
    first = submit()
    more = [
        Future(
            owner_id=first.owner_id,
            queue=first.queue,
            kind="add",
            payload=first.payload,
            payload_digest=first.payload_digest,
            created_at=first.created_at,
        )
        for _ in range(1100)
    ]
    Future.objects.bulk_create(more)

    assert queue_position(submit()) == 1000


def test_the_wait_is_unknown_until_the_worker_knows_its_pace(
    submit: SubmitFactory, worker: Worker
) -> None:
    futures = [submit() for _ in range(4)]
    assert future_place(futures[3]).estimated_wait_seconds is None

    worker_live(worker, {})
    assert future_place(futures[3]).estimated_wait_seconds is None

    worker_heartbeat(worker, {"futures_per_second": 8.0})
    place = future_place(futures[3])
    assert (place.position, place.estimated_wait_seconds) == (3, 0.5)

    Worker.objects.update(heartbeat_at=timezone.now() - timedelta(seconds=31))
    place = future_place(futures[3])
    assert (place.queue.state, place.estimated_wait_seconds) == ("paused_capacity", None)
