"""Two at once, on connections of their own: one wins, and the rows show that."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from django.db import OperationalError, connections, transaction
from django_q.models import OrmQ

from futures import notify
from futures.broker import PostgresBroker
from futures.cancelling import future_cancel
from futures.claiming import future_claim
from futures.errors import Fenced, FutureNotCancellable
from futures.models import Future, Lane, Worker
from futures.transitions import State
from tests.futures.conftest import QUEUE, SubmitFactory, finish, kill, race

pytestmark = pytest.mark.django_db(transaction=True)

ROUNDS = 10


def claim(worker: Worker, max_futures: int = 100) -> list[Future]:
    return future_claim(worker=worker, max_futures=max_futures, max_cost=10**6)


def test_racing_repeats_of_one_request_are_one_future(submit: SubmitFactory, lane: Lane) -> None:
    for seq_id in range(1, ROUNDS + 1):
        futures = race(*[partial(submit, lane, seq_id=seq_id)] * 4)

        assert len({future.pk for future in futures}) == 1
    assert Future.objects.count() == OrmQ.objects.count() == ROUNDS


def test_racing_requests_for_one_seq_id_have_one_winner(submit: SubmitFactory, lane: Lane) -> None:
    for seq_id in range(1, ROUNDS + 1):
        outcomes = race(*[partial(submit, lane, seq_id=seq_id, payload={"n": n}) for n in range(4)])

        assert sorted(type(outcome).__name__ for outcome in outcomes) == [
            "Future",
            *["SeqIdReused"] * 3,
        ]
    assert Future.objects.count() == ROUNDS


def test_racing_repeats_by_key_consume_one_seq_id(submit: SubmitFactory, lane: Lane) -> None:
    for number in range(ROUNDS):
        futures = race(*[partial(submit, lane, idempotency_key=f"k{number}")] * 4)

        assert {future.seq_id for future in futures} == {number + 1}


def test_racing_submitters_number_a_lane_without_gaps(submit: SubmitFactory, lane: Lane) -> None:
    for _ in range(ROUNDS):
        race(*[partial(submit, lane)] * 4)

    numbers = Future.objects.order_by("seq_id").values_list("seq_id", flat=True)
    assert list(numbers) == list(range(1, 4 * ROUNDS + 1))


def test_a_repeat_of_a_submission_that_is_undone_is_a_submission(
    submit: SubmitFactory, lane: Lane
) -> None:
    with ThreadPoolExecutor(1) as pool, transaction.atomic():
        undone = submit(lane, seq_id=1)
        # Waits at the unique constraint until this transaction has ended.
        other = pool.submit(race, partial(submit, lane, seq_id=1))
        wait_until_somebody_waits()
        transaction.set_rollback(True)
    [future] = other.result()

    assert future.pk != undone.pk
    assert Future.objects.get().pk == future.pk


def wait_until_somebody_waits() -> None:
    """Return once another connection of this database waits for a lock."""
    while True:
        with connections["default"].cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND wait_event_type = 'Lock'"
            )
            if cursor.fetchone() != (0,):
                return
            # Inside a transaction the statistics are a snapshot unless it is dropped.
            cursor.execute("SELECT pg_stat_clear_snapshot()")


def test_racing_claims_share_no_future_and_keep_the_order(
    submit: SubmitFactory, lane_factory: Callable[..., Lane], worker: Worker
) -> None:
    for _ in range(3):
        lane = lane_factory()
        for _ in range(8):
            submit(lane)
        submit()
    claimed: list[Future] = []
    while shares := [share for share in race(*[partial(claim, worker, 5)] * 3) if share]:
        claimed += [future for share in shares for future in share]
        for share in shares:
            for lane_id in {future.lane_id for future in share} - {None}:
                numbers = [future.seq_id for future in share if future.lane_id == lane_id]
                assert numbers == list(range(numbers[0], numbers[-1] + 1))

    assert len(claimed) == 27
    assert len({future.pk for future in claimed}) == 27


def test_a_claim_that_waited_for_another_of_its_worker_takes_nothing_twice_and_nothing_early(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    for _ in range(4):
        submit(lane)
    OrmQ.objects.all().delete()
    with ThreadPoolExecutor(1) as pool, transaction.atomic():
        first = claim(worker, 2)
        claiming = pool.submit(race, partial(claim, worker, 2))
        wait_until_somebody_waits()
    [second] = claiming.result()

    assert worker.more_waits
    third = claim(worker, 4)
    assert [future.seq_id for future in [*first, *second, *third]] == [1, 2, 3, 4]


def test_a_takeover_waits_for_a_claim_and_gets_back_what_it_took(
    submit: SubmitFactory, worker: Worker, worker_factory: Callable[..., Worker]
) -> None:
    submit()
    OrmQ.objects.all().delete()
    kill(worker)
    with ThreadPoolExecutor(1) as pool, transaction.atomic():
        claim(worker)
        starting = pool.submit(race, worker_factory)
        wait_until_somebody_waits()
    [successor] = starting.result()

    assert [future.attempts for future in claim(successor)] == [1]


def test_cancel_against_claim_has_one_winner(submit: SubmitFactory, worker: Worker) -> None:
    for _ in range(2 * ROUNDS):
        future = submit()
        cancelled, claimed = race(
            partial(future_cancel, request_id=future.pk, owner_id=future.owner_id),
            partial(claim, worker),
        )

        row = Future.objects.get(pk=future.pk)
        if isinstance(cancelled, FutureNotCancellable):
            assert [running.pk for running in claimed] == [future.pk]
            assert row.state == State.RUNNING
        else:
            assert claimed == []
            assert row.state == State.CANCELLED


def test_a_claim_passes_over_what_is_cancelled_under_it(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    futures = [submit(lane) for _ in range(3)]
    with ThreadPoolExecutor(1) as pool, transaction.atomic():
        future_cancel(request_id=futures[1].pk, owner_id=futures[1].owner_id)
        claiming = pool.submit(race, partial(claim, worker))
        wait_until_somebody_waits()
    [claimed] = claiming.result()

    assert [future.seq_id for future in claimed] == [1, 3]
    lane.refresh_from_db()
    assert lane.next_seq_id == 4


def test_finish_against_takeover_has_one_winner(
    submit: SubmitFactory, worker_factory: Callable[..., Worker]
) -> None:
    worker = worker_factory()
    for _ in range(ROUNDS):
        submit()
        running = claim(worker)
        kill(worker)
        fenced, successor = race(partial(finish, worker, *running), worker_factory)

        [row] = Future.objects.filter(pk=running[0].pk)
        if fenced is None:
            assert (row.state, row.attempts) == (State.READY, 0)
        else:
            assert isinstance(fenced, Fenced)
            assert (row.state, row.attempts) == (State.PENDING, 1)
            finish(successor, *claim(successor))
        worker = successor


def test_no_doorbell_is_lost_between_submit_and_claim(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    """Futures that a claim did not see still have a doorbell."""
    for _ in range(3 * ROUNDS):
        future, claimed = race(partial(submit, lane), partial(claim, worker))

        if not claimed:
            assert OrmQ.objects.filter(key=QUEUE).exists()
            claimed = claim(worker)
        assert [running.pk for running in claimed] == [future.pk]


def test_no_doorbell_is_lost_when_the_submitter_commits_after_the_claim(
    submit: SubmitFactory, worker: Worker
) -> None:
    broker = PostgresBroker(list_key=QUEUE)
    with transaction.atomic():
        submit()
        [claimed] = race(partial(claim, worker))
        assert claimed == []
    assert len(broker.claim()) == 1
    assert len(claim(worker)) == 1


def test_a_submission_whose_bell_cannot_ring_stands(
    submit: SubmitFactory,
    lane: Lane,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def lost(sql: str, parameters: object) -> None:
        raise OperationalError("the connection is lost")

    monkeypatch.setattr(notify, "execute", lost)
    future = submit(lane)

    assert Future.objects.get().pk == future.pk
    assert "the connection is lost" in caplog.text


def test_a_cancellation_that_nobody_can_be_told_of_stands(
    submit: SubmitFactory, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    future = submit(lane)

    def lost(sql: str, parameters: object) -> None:
        raise OperationalError("the connection is lost")

    monkeypatch.setattr(notify, "execute", lost)
    future_cancel(request_id=future.pk, owner_id=future.owner_id)

    assert Future.objects.get().state == State.CANCELLED
