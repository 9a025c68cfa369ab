"""How many come before a waiting future, and how long that takes."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from futures.cancelling import future_cancel
from futures.claiming import future_claim
from futures.lane_gaps import SETTLE_SECONDS, gaps_refuse
from futures.models import Future, Lane, Worker
from futures.queue_positions import QueuePosition, queue_position
from futures.queue_positions import future_position as place_of
from futures.workers import worker_heartbeat, worker_live
from tests.futures.conftest import SubmitFactory, finish

pytestmark = pytest.mark.django_db

GAP_SECONDS = 60.0


def future_position(future: Future) -> QueuePosition:
    return place_of(Future.objects.get(pk=future.pk), gap_seconds=GAP_SECONDS)


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
    # The last future's position is exact; earlier ones may be overtaken by a later owner's first.
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
    assert future_position(futures[3]).estimated_wait_seconds is None

    worker_live(worker, {})
    assert future_position(futures[3]).estimated_wait_seconds is None

    worker_heartbeat(worker, {"futures_per_second": 8.0})
    found = future_position(futures[3])
    assert (found.position, found.estimated_wait_seconds) == (3, 0.5)

    Worker.objects.update(heartbeat_at=timezone.now() - timedelta(seconds=31))
    found = future_position(futures[3])
    assert (found.state, found.estimated_wait_seconds) == ("paused_capacity", None)


def test_who_waits_for_a_number_is_told_which_and_when_it_fails(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    worker_live(worker, {"futures_per_second": 8.0})
    submit(lane, seq_id=1)
    early = submit(lane, seq_id=4)
    submit(lane, seq_id=2)

    found = future_position(early)

    assert (found.state, found.estimated_wait_seconds) == ("paused_capacity", None)
    fails_at = worker.started_at + timedelta(seconds=SETTLE_SECONDS)
    assert found.reason == (
        "The request with seq_id 3 has not arrived, and this one must run after it. If it does "
        f"not come, this one fails at {fails_at:%Y-%m-%d %H:%M:%S} UTC."
    )

    submit(lane, seq_id=3)
    assert future_position(early).reason == "It runs after 3 earlier requests of the same model."


@pytest.mark.parametrize("claims", [False, True])
def test_the_missing_number_is_the_first_one_whatever_was_claimed(
    submit: SubmitFactory, lane: Lane, worker: Worker, claims: bool
) -> None:
    worker_live(worker, {})
    for seq_id in (1, 2, 5, 8):
        last = submit(lane, seq_id=seq_id)
    if claims:
        assert len(future_claim(worker=worker, max_futures=9, max_cost=9)) == 2

    assert future_position(last).reason.startswith("The request with seq_id 3 has not arrived")


def test_the_time_that_is_told_is_the_time_at_which_it_fails(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    Worker.objects.update(started_at=timezone.now() - timedelta(days=1))
    worker_live(worker, {})
    late = submit(lane, seq_id=2)
    told = late.created_at + timedelta(seconds=GAP_SECONDS)
    assert f"{told:%Y-%m-%d %H:%M:%S} UTC" in future_position(late).reason

    for moment, failed in ((GAP_SECONDS - 5, 0), (GAP_SECONDS + 5, 1)):
        Future.objects.update(created_at=timezone.now() - timedelta(seconds=moment))
        assert future_position(late).reason.endswith("It fails soon.") is bool(failed)
        assert gaps_refuse(queue=late.queue, patience_seconds=GAP_SECONDS) == failed


def test_without_a_worker_a_missing_number_is_told_too(submit: SubmitFactory, lane: Lane) -> None:
    found = future_position(submit(lane, seq_id=7))

    assert "seq_id 1 has not arrived" in found.reason
    assert "this one fails not before" in found.reason


def test_numbers_that_order_nothing_are_not_missed(
    submit: SubmitFactory, lane_factory: Callable[..., Lane], worker: Worker
) -> None:
    worker_live(worker, {})

    found = future_position(submit(lane_factory(ordered=False), seq_id=9))

    assert (found.state, found.reason) == ("active", "It is next.")


def test_the_reason_names_what_comes_first(
    submit: SubmitFactory, lane: Lane, owner_factory: Callable[[], Any], worker: Worker
) -> None:
    worker_live(worker, {})
    other = submit(owner_id=owner_factory().pk)
    first, second = submit(lane), submit(lane)

    assert future_position(other).reason == "It is next."
    assert future_position(first).reason == "Users take turns: one other request before it."
    assert future_position(second).reason == "It runs after one earlier request of the same model."

    future_claim(worker=worker, max_futures=1, max_cost=1)
    assert future_position(other).reason == "It is being computed."

    Future.objects.filter(pk=other.pk).update(attempts=1)
    assert future_position(first).reason.startswith(
        "A request that was running when a worker ended"
    )


def test_a_queue_that_nobody_serves_is_the_reason(
    submit: SubmitFactory, worker_factory: Callable[..., Worker]
) -> None:
    future = submit()
    assert future_position(future).reason == "No worker serves this queue at the moment."

    worker = worker_factory()
    assert future_position(future).reason == "The worker is starting."

    worker_live(worker, {})
    Worker.objects.update(heartbeat_at=timezone.now() - timedelta(seconds=31))
    assert future_position(future).reason == "The worker does not answer."
