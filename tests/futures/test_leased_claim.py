"""The claim of everything and the claim of the worker's own lanes take the same futures in the same
order as a model of the rules in plain Python; and what races with the second one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
from django.db import transaction
from django.utils import timezone
from django_q.models import OrmQ

from futures.claiming import future_claim
from futures.errors import Fenced
from futures.leases import lanes_release
from futures.lost_workers import crash_assumed, worker_reap
from futures.models import Future, Lane, Worker
from futures.transitions import State
from tests.futures.conftest import SubmitFactory, finish, kill, race

pytestmark = pytest.mark.django_db

MakeLane = Callable[..., Lane]

SEEDS = range(25)


@dataclass(frozen=True, kw_only=True)
class Expected:
    claimed: list[tuple[str | None, int | None]]
    next_seq_ids: dict[str, int]
    """Of the lanes in which something waits; the others may stay as they are."""
    more_waits: bool


def runnable_of(lane: Lane) -> Iterator[tuple[Future, Any]]:
    """The pending futures of the range without a gap, and since when each may run."""
    since = None
    for seq_id, future in enumerate(
        Future.objects.filter(lane=lane, seq_id__gte=lane.next_seq_id).order_by("seq_id"),
        lane.next_seq_id,
    ):
        if future.seq_id != seq_id:
            return
        since = max(since or future.created_at, future.created_at)
        if future.state == State.PENDING:
            yield future, since


def model(
    worker: Worker, *, max_futures: int, max_cost: int, passed_over: list[int], holds: bool
) -> Expected:
    lanes = [lane for lane in Lane.objects.all() if lane.owner_id not in passed_over]
    by_owner: dict[int, list[tuple[Any, str, int | None, Future]]] = {}
    for lane in lanes:
        for future, since in runnable_of(lane):
            by_owner.setdefault(lane.owner_id, []).append((since, lane.pk, future.seq_id, future))
    served = list(worker.owners_served)
    in_order = [
        key[-1]
        for key in sorted(
            (turn, served.index(owner) if owner in served else -1, *waiting)
            for owner, theirs in by_owner.items()
            for turn, waiting in enumerate(sorted(theirs, key=lambda each: each[:3]))
        )
    ]
    suspects = [future for future in in_order if future.attempts]
    if suspects:
        first = next(future for future in in_order if future.lane_id == suspects[0].lane_id)
        chosen = [] if holds else [first]
    else:
        spent = accumulate(future.cost for future in in_order)
        chosen = [
            future
            for place, (future, cost) in enumerate(zip(in_order, spent, strict=True))
            if place < max_futures and (cost <= max_cost or place == 0)
        ]
    taken = {future.pk for future in chosen}
    next_seq_ids = {}
    for lane in Lane.objects.filter(future__state=State.PENDING).distinct():
        upto = lane.next_seq_id
        rows = {future.seq_id: future for future in Future.objects.filter(lane=lane)}
        while (
            lane in lanes
            and upto in rows
            and (rows[upto].state != State.PENDING or rows[upto].pk in taken)
        ):
            upto += 1
        next_seq_ids[lane.pk] = upto
    return Expected(
        claimed=[(future.lane_id, future.seq_id) for future in chosen],
        next_seq_ids=next_seq_ids,
        more_waits=len(in_order) > len(chosen),
    )


@pytest.mark.parametrize("only_leased", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_claim_follows_the_rules(
    seed: int,
    only_leased: bool,
    worker: Worker,
    owner_factory: Callable[[], Any],
    lane_factory: MakeLane,
    submit: SubmitFactory,
) -> None:
    draw = random.Random(seed)  # noqa: S311
    owners = [owner_factory().pk for _ in range(3)]
    holds = draw.random() < 0.3
    if holds:
        submit()
        future_claim(worker=worker, max_futures=1, max_cost=1)
    now = timezone.now()
    rows = []
    for owner in owners:
        for _ in range(draw.randrange(3)):
            lane = lane_factory(owner_id=owner)
            Lane.objects.filter(pk=lane.pk).update(worker=worker)
            numbers = list(range(1, draw.randrange(2, 9)))
            if draw.random() < 0.4:
                numbers.remove(draw.choice(numbers))
            for seq_id in numbers:
                is_final = draw.random() < 0.25
                rows.append(
                    Future(
                        owner_id=owner,
                        queue=lane.queue,
                        lane=lane,
                        seq_id=seq_id,
                        kind="add",
                        state=State.CANCELLED if is_final else State.PENDING,
                        payload=b"",
                        payload_digest=bytes(32),
                        cost=draw.randrange(6),
                        attempts=int(draw.random() < 0.02),
                        created_at=now - timedelta(seconds=draw.randrange(1, 9)),
                        finished_at=now if is_final else None,
                    )
                )
    Future.objects.bulk_create(rows)
    worker.owners_served = draw.sample(owners, draw.randrange(3))
    options: dict[str, Any] = {
        "max_futures": draw.randrange(1, 12),
        "max_cost": draw.randrange(1, 40),
        "passed_over": draw.sample(owners, draw.randrange(2)),
    }
    expected = model(worker, **options, holds=holds)

    claimed = future_claim(worker=worker, **options, only_leased=only_leased)

    assert [(future.lane_id, future.seq_id) for future in claimed] == expected.claimed
    moved = Lane.objects.filter(pk__in=expected.next_seq_ids).values_list("pk", "next_seq_id")
    assert dict(moved) == expected.next_seq_ids
    if claimed:  # a claim that has only skipped final rows looks again
        assert worker.more_waits == expected.more_waits


def race_of_two(*calls: Callable[[], Any]) -> list[Any]:
    """Two calls of different kinds at once."""
    return race(*calls)


@pytest.fixture
def leased(worker: Worker, submit: SubmitFactory, lane_factory: MakeLane) -> list[Lane]:
    """Three lanes of the worker, in which ten futures each wait for a claim of its own lanes."""
    lanes = [lane_factory() for _ in range(3)]
    for lane in lanes:
        submit(lane)
    finish(worker, *future_claim(worker=worker, max_futures=3, max_cost=3))
    for lane in lanes * 10:
        submit(lane)
    return lanes


@pytest.mark.django_db(transaction=True)
def test_racing_claims_of_one_worker_take_no_future_of_its_lanes_twice(
    worker: Worker, leased: list[Lane]
) -> None:
    claim = partial(future_claim, worker=worker, max_futures=4, max_cost=10**6, only_leased=True)
    claimed: list[Future] = []
    while any(shares := race(*[claim] * 3)):
        for share in shares:
            assert not isinstance(share, Exception)
            for lane in leased:
                numbers = [future.seq_id or 0 for future in share if future.lane_id == lane.pk]
                assert numbers == list(
                    range(numbers[0], numbers[0] + len(numbers)) if numbers else []
                )
            claimed += share
    assert len(claimed) == len({future.pk for future in claimed}) == 30


@pytest.mark.django_db(transaction=True)
def test_a_claim_of_own_lanes_against_the_end_of_the_worker_has_one_winner(
    worker_factory: Callable[[], Worker], submit: SubmitFactory, lane: Lane
) -> None:
    for _ in range(10):
        first, second = worker_factory(), worker_factory()
        submit(lane)
        finish(first, *future_claim(worker=first, max_futures=1, max_cost=1))
        waiting = submit(lane)

        claimed, reaped = race_of_two(
            partial(future_claim, worker=first, max_futures=1, max_cost=1, only_leased=True),
            partial(worker_reap, first, crashed=crash_assumed, must_be_unlocked=False),
        )

        assert reaped is True
        [again] = future_claim(worker=second, max_futures=1, max_cost=1)
        assert again.pk == waiting.pk
        if isinstance(claimed, Fenced):
            assert again.attempts == 0
        else:
            assert [future.pk for future in claimed] == [waiting.pk]
            assert again.attempts == 1
        finish(second, again)
        lanes_release(worker=second, lane_ids=[lane.pk])
        for worker in (first, second):
            kill(worker)
            Worker.objects.filter(pk=worker.pk).update(state=Worker.WorkerState.STOPPED)


@pytest.mark.django_db(transaction=True)
def test_no_doorbell_is_lost_between_submit_and_a_claim_of_own_lanes(
    worker: Worker, submit: SubmitFactory, lane: Lane
) -> None:
    submit(lane)
    claim = partial(future_claim, worker=worker, max_futures=9, max_cost=9)
    finish(worker, *claim())
    for _ in range(20):
        with transaction.atomic():
            OrmQ.objects.all().delete()
        future, claimed = race_of_two(partial(submit, lane), partial(claim, only_leased=True))

        if not claimed:
            assert OrmQ.objects.filter(key=worker.queue).exists()
            claimed = claim(only_leased=True)
        assert [running.pk for running in claimed] == [future.pk]
        finish(worker, *claimed)
