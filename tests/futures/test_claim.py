"""The futures that a claim takes, their order, and those that it does not take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from django_q.models import OrmQ

from futures.broker import PostgresBroker
from futures.cancelling import future_cancel
from futures.claiming import MAX_WINDOW, MIN_WINDOW, future_claim
from futures.errors import Fenced
from futures.finishing import futures_release
from futures.models import Future, Lane, Worker
from futures.payload import decode
from futures.services import Refusal
from futures.transitions import State
from tests.futures.conftest import SubmitFactory, finish

pytestmark = pytest.mark.django_db


def claim(worker: Worker, max_futures: int = 100, max_cost: int = 10**6) -> list[Future]:
    return future_claim(worker=worker, max_futures=max_futures, max_cost=max_cost)


def numbers(futures: Iterable[Future]) -> list[int | None]:
    return [future.seq_id for future in futures]


def keys(futures: Iterable[Future]) -> list[str]:
    return [future.pk for future in futures]


def test_a_claim_returns_running_futures_with_payloads(
    submit: SubmitFactory, worker: Worker
) -> None:
    submit(payload={"a": 1}, summary={"tokens": 3})

    [future] = claim(worker)

    assert decode(bytes(future.payload)) == {"a": 1}
    assert future.summary == {"tokens": 3}
    row = Future.objects.get(pk=future.pk)
    for field in Future._meta.concrete_fields:
        assert getattr(row, field.attname) == getattr(future, field.attname), field.name
    assert (row.state, row.worker_id) == (State.RUNNING, worker.pk)
    assert row.started_at is not None


def test_nothing_is_claimed_twice(submit: SubmitFactory, lane: Lane, worker: Worker) -> None:
    submit(lane)
    submit()

    assert len(claim(worker)) == 2
    assert claim(worker) == []


def test_a_lane_is_claimed_in_the_order_of_its_numbers(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    for seq_id in (3, 1, 2):
        submit(lane, seq_id=seq_id)

    assert numbers(claim(worker)) == [1, 2, 3]


def test_a_missing_number_stops_a_lane_until_it_arrives(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    submit(lane, seq_id=1)
    submit(lane, seq_id=3)

    assert numbers(claim(worker)) == [1]
    assert claim(worker) == []
    submit(lane, seq_id=2)
    assert numbers(claim(worker)) == [2, 3]


def test_a_lane_whose_first_number_is_missing_waits(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    submit(lane, seq_id=2)

    assert claim(worker) == []


def test_final_futures_are_passed_over(submit: SubmitFactory, lane: Lane, worker: Worker) -> None:
    futures = [submit(lane) for _ in range(3)]
    submit(lane, refusal=Refusal(error="invalid"))
    submit(lane)
    for future in futures[:2]:
        future_cancel(request_id=future.pk, owner_id=future.owner_id)

    assert numbers(claim(worker)) == [3, 5]


def test_a_refused_request_that_arrives_late_fills_the_gap(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    submit(lane, seq_id=2)
    assert claim(worker) == []

    submit(lane, seq_id=1, refusal=Refusal(error="invalid"))

    assert numbers(claim(worker)) == [2]


def test_more_final_futures_than_a_claim_looks_at_are_passed_over(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    refused = submit(lane, refusal=Refusal(error="invalid"))
    Future.objects.bulk_create(
        Future(
            owner_id=lane.owner_id,
            queue=lane.queue,
            lane=lane,
            seq_id=seq_id,
            kind="add",
            state=State.CANCELLED,
            payload_digest=bytes(32),
            finished_at=refused.finished_at,
        )
        for seq_id in range(2, 2 * MAX_WINDOW + 10)
    )
    submit(lane)

    assert numbers(claim(worker, max_futures=1)) == [2 * MAX_WINDOW + 10]


def test_what_arrives_while_a_lane_runs_is_claimed_next(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    submit(lane)
    claim(worker)

    submit(lane)

    assert numbers(claim(worker)) == [2]


def test_an_unordered_lane_does_not_wait_for_missing_numbers(
    submit: SubmitFactory, lane_factory: Callable[..., Lane], worker: Worker
) -> None:
    lane = lane_factory(ordered=False)
    for seq_id in (10**9, 7, 0):
        submit(lane, seq_id=seq_id)

    assert sorted(numbers(claim(worker))) == [0, 7, 10**9]


def test_another_queue_is_left_alone(
    submit: SubmitFactory, lane_factory: Callable[..., Lane], worker: Worker
) -> None:
    submit(queue="other")
    submit(lane_factory(queue="other"), queue="other")

    assert claim(worker) == []
    assert OrmQ.objects.filter(key="other").count() == 2


def test_a_claim_deletes_the_doorbells_even_locked_ones(
    submit: SubmitFactory, worker: Worker
) -> None:
    submit()
    PostgresBroker(list_key=worker.queue).claim()

    claim(worker)

    assert not OrmQ.objects.filter(key=worker.queue).exists()


def test_owners_take_turns(
    submit: SubmitFactory,
    lane_factory: Callable[..., Lane],
    owner_factory: Callable[[], Any],
    worker: Worker,
) -> None:
    greedy, modest, late = (owner_factory() for _ in range(3))
    lane = lane_factory(owner_id=greedy.pk)
    for _ in range(5):
        submit(lane)
    submit(owner_id=modest.pk)
    submit(owner_id=modest.pk)
    submit(owner_id=late.pk)

    owners = [future.owner_id for future in claim(worker)]

    g, m, z = greedy.pk, modest.pk, late.pk
    assert owners == [g, m, z, g, m, g, g, g]


def test_an_owner_cannot_get_more_turns_by_more_lanes(
    submit: SubmitFactory,
    lane_factory: Callable[..., Lane],
    owner_factory: Callable[[], Any],
    worker: Worker,
) -> None:
    greedy, modest = owner_factory(), owner_factory()
    for _ in range(4):
        submit(lane_factory(owner_id=greedy.pk))
    for _ in range(2):
        submit(lane_factory(owner_id=modest.pk))

    owners = [future.owner_id for future in claim(worker, max_futures=4)]

    assert owners == [greedy.pk, modest.pk, greedy.pk, modest.pk]


def test_claims_too_small_for_everybody_go_round(
    submit: SubmitFactory,
    lane_factory: Callable[..., Lane],
    owner_factory: Callable[[], Any],
    worker: Worker,
) -> None:
    greedy, modest, late = (owner_factory() for _ in range(3))
    lane = lane_factory(owner_id=greedy.pk)
    for _ in range(4):
        submit(lane, cost=9)
    for owner in (modest, modest, late):
        submit(owner_id=owner.pk, cost=9)

    # The budget has room for one at a time.
    owners = [claim(worker, max_cost=10)[0].owner_id for _ in range(7)]

    g, m, z = greedy.pk, modest.pk, late.pk
    assert owners == [g, m, z, g, m, g, g]


def test_a_large_request_is_not_passed_by_for_ever(
    submit: SubmitFactory,
    lane_factory: Callable[..., Lane],
    owner_factory: Callable[[], Any],
    worker: Worker,
) -> None:
    lane = lane_factory(owner_id=owner_factory().pk)
    for _ in range(5):
        submit(lane, cost=4)
    large = submit(owner_id=owner_factory().pk, cost=8)

    claims = [[future.pk for future in claim(worker, max_cost=10)] for _ in range(2)]

    assert large.pk in claims[1]


def test_the_budgets_cut_the_claim_and_the_rest_comes_next(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    for cost in (4, 5, 3, 1):
        submit(lane, cost=cost)

    assert numbers(claim(worker, max_cost=9)) == [1, 2]
    assert numbers(claim(worker, max_futures=1)) == [3]
    assert numbers(claim(worker)) == [4]


@pytest.mark.parametrize("lane_kind", ["ordered", "unordered", "none"])
def test_a_claim_says_whether_it_left_something_behind(
    lane_kind: str, submit: SubmitFactory, lane_factory: Callable[..., Lane], worker: Worker
) -> None:
    lane = None if lane_kind == "none" else lane_factory(ordered=lane_kind == "ordered")
    for _ in range(MIN_WINDOW + 1):  # one more than the claim reads
        submit(lane)

    said = [(len(claim(worker, MIN_WINDOW)), worker.more_waits) for _ in range(2)]

    assert said == [(MIN_WINDOW, True), (1, False)]


def test_what_waits_behind_a_gap_is_not_left_behind(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    submit(lane, seq_id=1)
    submit(lane, seq_id=3)

    assert numbers(claim(worker)) == [1]
    assert not worker.more_waits


def test_a_future_above_the_cost_budget_is_claimed_alone(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    submit(lane, cost=1000)
    submit(lane, cost=1)

    assert numbers(claim(worker, max_cost=10)) == [1]


def test_what_is_released_is_claimed_again_in_order(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    for _ in range(4):
        submit(lane)
    futures = claim(worker)

    futures_release(worker=worker, request_ids=keys(futures[1:]))
    row = Future.objects.get(pk=futures[1].pk)

    assert (row.state, row.attempts, row.worker_id, row.started_at) == ("pending", 0, None, None)
    assert numbers(claim(worker)) == [2, 3, 4]


def test_releasing_what_is_not_held_releases_nothing(submit: SubmitFactory, worker: Worker) -> None:
    submit()
    submit()
    done, held = claim(worker)
    finish(worker, done)

    with pytest.raises(Fenced):
        futures_release(worker=worker, request_ids=[held.pk, done.pk])
    assert Future.objects.get(pk=held.pk).state == State.RUNNING


def test_a_replaced_worker_claims_nothing(
    submit: SubmitFactory, worker_factory: Callable[..., Worker]
) -> None:
    old = worker_factory()
    Worker.objects.filter(pk=old.pk).update(state=Worker.WorkerState.LOST)
    submit()

    with pytest.raises(Fenced):
        claim(old)


def test_an_owner_who_is_passed_over_keeps_what_waits(
    submit: SubmitFactory,
    lane_factory: Callable[..., Lane],
    owner_factory: Callable[[], Any],
    worker: Worker,
) -> None:
    """In lanes, in unordered lanes and without; the next claim takes all of it."""
    full, other = owner_factory(), owner_factory()
    of = {
        owner.pk: [
            submit(lane_factory(owner_id=owner.pk), owner_id=owner.pk),
            submit(lane_factory(owner_id=owner.pk, ordered=False), owner_id=owner.pk, seq_id=5),
            submit(owner_id=owner.pk),
        ]
        for owner in (full, other)
    }
    some = future_claim(worker=worker, max_futures=9, max_cost=9, passed_over=[full.pk])
    assert sorted(keys(some)) == sorted(keys(of[other.pk]))
    assert sorted(keys(claim(worker))) == sorted(keys(of[full.pk]))
