"""Cancelling futures that a worker holds: the cancellation is final, and no worker fails because of
it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from django.db import transaction

from futures.broker import bell_rang
from futures.cancelled import futures_cancelled
from futures.cancelling import future_cancel
from futures.errors import Fenced, FutureNotCancellable, FutureNotFound
from futures.finishing import futures_release
from futures.models import Future, Lane, Worker
from futures.notify import Bell
from futures.transitions import State
from futures.workers import worker_stop
from tests.futures.conftest import QUEUE, SubmitFactory, finish, kill, race
from tests.futures.test_races import ROUNDS, claim, wait_until_somebody_waits

pytestmark = pytest.mark.django_db(transaction=True)


def cancel(future: Future) -> Future:
    return future_cancel(request_id=future.pk, owner_id=future.owner_id)


def state_of(future: Future) -> str:
    return Future.objects.values_list("state", flat=True).get(pk=future.pk)


def test_cancelling_an_interruptible_future_wins_against_its_claim_whoever_comes_first(
    submit: SubmitFactory, worker: Worker
) -> None:
    for _ in range(2 * ROUNDS):
        future = submit(interruptible=True)
        cancelled, claimed = race(partial(cancel, future), partial(claim, worker))

        assert cancelled.state == state_of(future) == State.CANCELLED
        finish(worker, *claimed)  # drops it
        assert state_of(future) == State.CANCELLED


def test_cancel_against_finish_has_one_winner(submit: SubmitFactory, worker: Worker) -> None:
    for _ in range(2 * ROUNDS):
        future, beside = submit(interruptible=True), submit()
        running = claim(worker)
        cancelled, finished = race(partial(cancel, future), partial(finish, worker, *running))

        assert finished is None
        assert state_of(beside) == State.READY
        row = Future.objects.get(pk=future.pk)
        if isinstance(cancelled, FutureNotCancellable):
            assert row.state == State.READY
        else:
            assert (row.state, row.result) == (State.CANCELLED, None)


def test_cancel_against_takeover_is_a_cancellation(
    submit: SubmitFactory, worker_factory: Callable[..., Worker]
) -> None:
    worker = worker_factory()
    for _ in range(ROUNDS):
        future = submit(interruptible=True)
        claim(worker)
        kill(worker)
        cancelled, worker = race(partial(cancel, future), worker_factory)

        assert cancelled.state == state_of(future) == State.CANCELLED
        assert claim(worker) == []


def test_racing_cancellations_are_one(submit: SubmitFactory, worker: Worker) -> None:
    for _ in range(ROUNDS):
        future = submit(interruptible=True)
        running = claim(worker)
        cancellations = race(*[partial(cancel, future)] * 4)

        finished_at = Future.objects.get(pk=future.pk).finished_at
        assert {cancelled.finished_at for cancelled in cancellations} == {finished_at}
        finish(worker, *running)


@pytest.mark.parametrize("verb", ["finish", "release", "stop"])
def test_a_worker_that_waited_for_a_cancellation_leaves_it_alone(
    submit: SubmitFactory, lane: Lane, worker: Worker, verb: str
) -> None:
    futures = [submit(lane, interruptible=True) for _ in range(3)]
    running = claim(worker)
    verbs: dict[str, Callable[[], None]] = {
        "finish": partial(finish, worker, *running),
        "release": partial(
            futures_release, worker=worker, request_ids=[future.pk for future in running]
        ),
        "stop": partial(worker_stop, worker),
    }
    with ThreadPoolExecutor(1) as pool, transaction.atomic():
        cancel(futures[0])
        doing = pool.submit(race, verbs[verb])
        wait_until_somebody_waits()
    assert doing.result() == [None]

    rest = State.READY if verb == "finish" else State.PENDING
    assert [state_of(future) for future in futures] == [State.CANCELLED, rest, rest]


def test_a_worker_that_was_replaced_is_told_so_even_if_all_it_held_was_cancelled(
    submit: SubmitFactory, worker: Worker, worker_factory: Callable[..., Worker]
) -> None:
    future = submit(interruptible=True)
    running = claim(worker)
    kill(worker)
    cancel(future)
    worker_factory()

    with pytest.raises(Fenced):
        finish(worker, *running)
    assert state_of(future) == State.CANCELLED


def test_nobody_else_can_cancel_what_runs(
    submit: SubmitFactory, worker: Worker, owner_factory: Callable[[], Any]
) -> None:
    future = submit(interruptible=True)
    claim(worker)

    with pytest.raises(FutureNotFound):
        future_cancel(request_id=future.pk, owner_id=owner_factory().pk)
    assert state_of(future) == State.RUNNING


def test_only_who_has_it_is_told_that_a_future_was_cancelled(
    submit: SubmitFactory, worker: Worker
) -> None:
    bell_rang(QUEUE)  # listens from now on
    running, waiting = submit(interruptible=True), submit(interruptible=True)
    claim(worker, 1)
    assert bell_rang(QUEUE, 5.0) == Bell.RANG

    cancel(waiting)
    assert bell_rang(QUEUE) == Bell.SILENT
    cancel(running)
    assert bell_rang(QUEUE, 5.0) == Bell.CANCELLED
    assert futures_cancelled(worker=worker, request_ids=[running.pk, waiting.pk]) == {running.pk}
