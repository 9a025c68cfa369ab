"""Several workers of one queue: which of them runs a lane, and who may commit for it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from django.db import transaction
from django.db.models import F
from django.utils import timezone

from futures import claiming
from futures.broker import bell_rang, listen_as
from futures.claiming import future_claim
from futures.errors import Fenced
from futures.finishing import futures_release
from futures.leases import lanes_release, lease_is_held
from futures.lost_workers import (
    LONGEST_LOOK_SECONDS,
    SILENT_SECONDS,
    SILENT_UNLOCKED_SECONDS,
    Colleagues,
    crash_assumed,
    worker_reap,
    workers_reap,
)
from futures.models import Future, Lane, Worker
from futures.notify import Bell
from futures.selectors import queue_state
from futures.workers import worker_heartbeat, worker_live, worker_stop
from tests.futures.conftest import QUEUE, SubmitFactory, finish, kill, race
from tests.waiting import LONG_SECONDS

pytestmark = pytest.mark.django_db

Start = Callable[..., Worker]
MakeLane = Callable[..., Lane]


def claim(worker: Worker, max_futures: int = 100, **options: Any) -> list[Future]:
    return future_claim(worker=worker, max_futures=max_futures, max_cost=10**6, **options)


def lanes_of(futures: list[Future]) -> set[str]:
    return {future.lane_id for future in futures if future.lane_id is not None}


@pytest.fixture
def pair(worker_factory: Start, monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    """Two live workers of a queue that leave work to each other for as long as it takes."""
    monkeypatch.setattr(claiming, "PATIENCE_SECONDS", LONG_SECONDS)
    workers = [worker_factory(), worker_factory()]
    for worker in workers:
        worker_live(worker, {})
    return workers


def test_a_lane_stays_with_the_worker_that_claimed_from_it(
    pair: list[Worker], submit: SubmitFactory, lane: Lane
) -> None:
    first, second = pair
    submit(lane)
    [future] = claim(first)
    finish(first, future)
    submit(lane)

    assert claim(second) == []
    assert not second.left_to_others
    assert first.leases == {lane.pk}
    assert [future.seq_id for future in claim(first)] == [2]


def test_a_worker_that_knows_of_nothing_else_looks_only_at_its_own_lanes(
    worker: Worker, submit: SubmitFactory, lane_factory: MakeLane
) -> None:
    own, other = lane_factory(), lane_factory()
    submit(own)
    claim(worker)
    submit(own)
    submit(other)
    submit()

    assert lanes_of(claim(worker, only_leased=True)) == {own.pk}
    assert claim(worker, only_leased=True) == []
    assert [future.lane_id for future in claim(worker)] == [other.pk, None]


def test_a_released_lane_goes_on_elsewhere_from_where_it_was(
    pair: list[Worker], submit: SubmitFactory, lane: Lane
) -> None:
    first, second = pair
    futures = [submit(lane) for _ in range(3)]
    running = claim(first)
    finish(first, running[0])

    lanes_release(worker=first, lane_ids=[lane.pk])
    assert first.leases == {lane.pk}, "it still runs futures of that lane"
    futures_release(worker=first, request_ids=[future.pk for future in running[1:]])
    lanes_release(worker=first, lane_ids=[lane.pk])

    assert first.leases == set()
    assert [future.pk for future in claim(second)] == [future.pk for future in futures[1:]]
    lane.refresh_from_db()
    assert lane.worker_id == second.pk


def test_a_worker_cannot_release_what_is_not_its_own(
    pair: list[Worker], submit: SubmitFactory, lane: Lane
) -> None:
    first, second = pair
    submit(lane)
    finish(first, *claim(first))

    lanes_release(worker=second, lane_ids=[lane.pk])

    assert lease_is_held(worker=first, lane_id=lane.pk)
    assert not lease_is_held(worker=second, lane_id=lane.pk)


def test_a_stopped_worker_leaves_its_lanes_free(
    pair: list[Worker], submit: SubmitFactory, lane: Lane
) -> None:
    first, second = pair
    submit(lane)
    claim(first)

    worker_stop(first)

    assert [(future.seq_id, future.attempts) for future in claim(second)] == [(1, 0)]


@pytest.mark.parametrize("free", range(1, 8))
def test_workers_lease_equal_shares_of_the_lanes(
    pair: list[Worker], submit: SubmitFactory, lane_factory: MakeLane, free: int
) -> None:
    lanes = [lane_factory() for _ in range(free)]
    for lane in lanes:
        submit(lane)
        submit(lane)

    taken = [claim(worker) for worker in pair]

    assert [len(lanes_of(futures)) for futures in taken] == [(free + 1) // 2, free // 2]
    assert [len(futures) for futures in taken] == [free + free % 2, free - free % 2]
    assert pair[0].left_to_others == (free > 1)
    assert not pair[1].left_to_others

    one_more = lane_factory()
    submit(one_more)
    for worker in pair[:: -1 if free % 2 == 0 else 1]:
        claim(worker)
    assert abs(len(pair[0].leases) - len(pair[1].leases)) <= 1
    assert len(pair[0].leases | pair[1].leases) == free + 1


def test_workers_share_what_has_no_order(
    pair: list[Worker], submit: SubmitFactory, lane_factory: MakeLane
) -> None:
    unordered = lane_factory(ordered=False)
    for _ in range(4):
        submit(unordered)
        submit()

    taken = [claim(worker) for worker in pair]
    rest = [claim(worker) for worker in pair]

    assert [len(futures) for futures in taken] == [4, 2]
    assert [len(futures) for futures in rest] == [1, 1]
    assert pair[0].leases == pair[1].leases == set()


def test_what_has_waited_is_left_to_nobody(
    pair: list[Worker], submit: SubmitFactory, lane_factory: MakeLane
) -> None:
    for _ in range(4):
        submit(lane_factory())
        submit()
    past = timedelta(seconds=2 * LONG_SECONDS)
    for moved in (-past, past):  # the second one by a submitter whose clock is wrong
        Future.objects.filter(state="pending").update(created_at=timezone.now() + moved)
        taken = claim(pair[0])
        assert len(taken) == 8
        assert not pair[0].left_to_others
        futures_release(worker=pair[0], request_ids=[future.pk for future in taken])
        lanes_release(worker=pair[0], lane_ids=lanes_of(taken))


def test_owners_take_turns_also_for_a_share(
    pair: list[Worker],
    submit: SubmitFactory,
    lane_factory: MakeLane,
    owner_factory: Callable[[], Any],
) -> None:
    many, few = owner_factory(), owner_factory()
    for owner, number in ((many, 5), (few, 1)):
        for _ in range(number):
            submit(lane_factory(owner_id=owner.pk))
            submit(owner_id=owner.pk)

    taken = claim(pair[0])

    assert [future.owner_id for future in taken].count(few.pk) == 2
    assert len(taken) == 6


def test_a_worker_that_only_starts_has_no_share(
    worker_factory: Start, submit: SubmitFactory, lane_factory: MakeLane
) -> None:
    live, _ = worker_factory(), worker_factory()
    worker_live(live, {})
    for _ in range(4):
        submit(lane_factory())

    assert len(claim(live)) == 4


@pytest.mark.django_db(transaction=True)
def test_racing_claims_of_several_workers_share_no_lane_and_no_future(
    worker_factory: Start, submit: SubmitFactory, lane_factory: MakeLane
) -> None:
    workers = [worker_factory() for _ in range(4)]  # none is live, so each takes all it can
    unordered = lane_factory(ordered=False)
    for _ in range(5):
        lanes = [lane_factory() for _ in range(6)]
        for lane in lanes * 3:
            submit(lane)
            submit(unordered)
            submit()
        held: dict[int, list[Future]] = {worker.pk: [] for worker in workers}
        while shares := race(*[partial(claim, worker, 7) for worker in workers]):
            assert not [share for share in shares if isinstance(share, Exception)]
            if not any(shares):
                break
            for worker, share in zip(workers, shares, strict=True):
                held[worker.pk] += share
        claimed = [future for futures in held.values() for future in futures]
        assert len(claimed) == len({future.pk for future in claimed}) == 3 * 18
        for lane in lanes:
            of_lane = [f for futures in held.values() for f in futures if f.lane_id == lane.pk]
            assert [future.seq_id for future in of_lane] == [1, 2, 3]
            assert len({future.worker_id for future in of_lane}) == 1
        for worker in workers:
            finish(worker, *held[worker.pk])
            lanes_release(worker=worker, lane_ids=set(worker.leases))


@pytest.mark.django_db(transaction=True)
def test_a_lane_may_pass_from_hand_to_hand_among_racing_workers(
    worker_factory: Start, submit: SubmitFactory, lane_factory: MakeLane
) -> None:
    """Each claims, commits and releases as fast as it can: every number takes effect once, in
    order."""
    workers = [worker_factory() for _ in range(3)]
    lanes = [lane_factory() for _ in range(3)]
    for lane in lanes * 20:
        submit(lane)
    committed: list[tuple[str | None, int | None]] = []

    def work(worker: Worker) -> None:
        for _ in range(200):
            futures = claim(worker, 2)
            with transaction.atomic():
                finish(worker, *futures)
                committed.extend((future.lane_id, future.seq_id) for future in futures)
            lanes_release(worker=worker, lane_ids=set(worker.leases))
            if not Future.objects.filter(state="pending").exists():
                return

    outcomes = race(*[partial(work, worker) for worker in workers])

    assert outcomes == [None] * 3
    for lane in lanes:
        numbers = [seq_id for lane_id, seq_id in committed if lane_id == lane.pk]
        assert numbers == list(range(1, 21))


@pytest.mark.django_db(transaction=True)
def test_a_worker_that_others_gave_up_commits_nothing_when_it_wakes(
    worker_factory: Start, submit: SubmitFactory, lane: Lane
) -> None:
    """As after SIGSTOP: its lock is held, and its epoch is over."""
    for _ in range(10):
        stopped, other = worker_factory(), worker_factory()
        submit(lane)
        held = claim(stopped)
        reap = partial(worker_reap, stopped, crashed=crash_assumed, must_be_unlocked=False)

        late, reaped = race(partial(finish, stopped, *held), reap)

        assert reaped is True
        [row] = Future.objects.filter(pk=held[0].pk)
        if late is None:  # its commit was first
            assert (row.state, row.worker_id) == ("ready", stopped.pk)
            assert claim(other) == []
        else:
            assert isinstance(late, Fenced)
            [again] = claim(other)
            assert again.pk == row.pk
            with pytest.raises(Fenced):
                finish(stopped, *held)
            finish(other, again)
        for useless in (
            partial(claim, stopped),
            partial(worker_heartbeat, stopped, {}),
            partial(finish, stopped, *held),
        ):
            with pytest.raises(Fenced):
                useless()
        assert not lease_is_held(worker=stopped, lane_id=lane.pk)
        kill(stopped)
        worker_stop(other)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("is_unlocked", "limit"), [(True, SILENT_UNLOCKED_SECONDS), (False, SILENT_SECONDS)]
)
@pytest.mark.django_db(transaction=True)
def test_a_worker_that_falls_silent_is_ended_by_its_colleagues(
    worker_factory: Start, submit: SubmitFactory, lane: Lane, is_unlocked: bool, limit: float
) -> None:
    silent, observer = worker_factory(), worker_factory()
    submit(lane)
    claim(silent)
    Worker.objects.filter(pk=silent.pk).update(hostname="elsewhere")
    clock = Clock()
    colleagues = Colleagues(observer, crashed=lambda worker: False, clock=clock)
    assert colleagues.look() == []
    if is_unlocked:
        kill(silent)
    while clock.now + 3 < limit:
        clock.now += 3
        # A wall clock that jumps says nothing.
        assert colleagues.look() == [], clock.now
    worker_heartbeat(observer, {})
    clock.now += 3

    assert colleagues.look() == [silent.pk]

    assert Worker.objects.get(pk=silent.pk).state == "lost"
    [again] = claim(observer)
    assert (again.attempts, again.interruptions) == (0, 1)


def test_a_heartbeat_ends_a_silence_and_a_pause_of_the_observer_is_none(
    worker_factory: Start,
) -> None:
    other, observer = worker_factory(), worker_factory()
    clock = Clock()
    colleagues = Colleagues(observer, crashed=crash_assumed, clock=clock)
    colleagues.look()
    for _ in range(3):
        clock.now += LONGEST_LOOK_SECONDS - 1
        assert colleagues.look() == []
        worker_heartbeat(other, {})
        clock.now += 10 * SILENT_SECONDS
        assert colleagues.look() == []
        clock.now += 10 * SILENT_SECONDS
        assert colleagues.look() == []
        worker_heartbeat(other, {})
    clock.now += 3600
    worker_heartbeat(other, {})
    assert colleagues.look() == []


@pytest.mark.django_db(transaction=True)
def test_only_the_holder_of_a_lease_is_woken_for_its_lane(
    pair: list[Worker], submit: SubmitFactory, lane: Lane
) -> None:
    first, second = pair
    heard = {}
    submit(lane)
    claim(first)
    for worker in pair:
        listen_as(worker)
        assert bell_rang(QUEUE, LONG_SECONDS) == Bell.RANG | Bell.CANCELLED  # it just began
        submit(lane)
        submit(lane, delayable=True)
        heard[worker.pk] = bell_rang(QUEUE, 0.05)
    listen_as(second)
    bell_rang(QUEUE, LONG_SECONDS)
    submit()
    assert bell_rang(QUEUE, LONG_SECONDS) == Bell.RANG
    assert heard == {first.pk: Bell.RANG_OWN | Bell.DELAYABLE_OWN, second.pk: Bell.SILENT}


@pytest.mark.django_db(transaction=True)
def test_a_lane_that_is_released_with_work_wakes_the_others(
    pair: list[Worker], submit: SubmitFactory, lane: Lane
) -> None:
    first, second = pair
    submit(lane)
    finish(first, *claim(first))
    submit(lane)
    listen_as(second)
    bell_rang(QUEUE, LONG_SECONDS)

    lanes_release(worker=first, lane_ids=[lane.pk])

    assert bell_rang(QUEUE, LONG_SECONDS) == Bell.RANG
    assert [future.seq_id for future in claim(second)] == [2]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("is_marked", [True, False])
def test_what_a_worker_of_the_former_version_left_is_given_back(
    worker_factory: Start, submit: SubmitFactory, lane: Lane, is_marked: bool
) -> None:
    """It leased nothing, and its supervisor only marked it; the migration marks it too."""
    former = worker_factory()
    submit(lane)
    submit(lane)
    claim(former)
    Lane.objects.update(worker=None)
    Worker.objects.filter(pk=former.pk).update(
        hostname="elsewhere", state="lost" if is_marked else "live"
    )
    kill(former)

    successor = worker_factory()

    assert Worker.objects.get(pk=former.pk).state == "lost"
    assert [future.seq_id for future in claim(successor)] == [1]  # a suspect, alone


def test_workers_of_other_machines_are_no_business_of_a_start(
    worker: Worker, submit: SubmitFactory, lane: Lane
) -> None:
    submit(lane)
    claim(worker)
    Worker.objects.update(hostname="elsewhere")

    workers_reap(queue=QUEUE, crashed=crash_assumed)

    assert Worker.objects.get(pk=worker.pk).state == "starting"
    assert Future.objects.get().worker_id == worker.pk


def test_a_queue_is_served_as_long_as_one_of_its_workers_is_live(pair: list[Worker]) -> None:
    first, second = pair
    worker_heartbeat(first, {"futures_per_second": 2.0})
    worker_heartbeat(second, {"futures_per_second": 0.5})
    assert queue_state(QUEUE).futures_per_second == 2.5
    assert queue_state(QUEUE).workers == 2

    Worker.objects.filter(pk=second.pk).update(heartbeat_at=F("heartbeat_at") - timedelta(hours=1))
    assert (queue_state(QUEUE).state, queue_state(QUEUE).workers) == ("active", 1)

    worker_stop(first)
    assert queue_state(QUEUE).reason == "The worker does not answer."
