"""A future whose worker crashed runs alone, and nobody waits for it longer than needed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from django.utils import timezone

from futures.claiming import SUSPECT_INTERRUPTIONS, SUSPECT_SECONDS
from futures.models import Future, Lane, Worker
from tests.futures.conftest import SubmitFactory, finish, kill
from tests.futures.test_claim import claim, keys

pytestmark = pytest.mark.django_db


def suspect(*futures: Future) -> None:
    """Simulate a crash of the worker while these ran."""
    Future.objects.filter(pk__in=keys(futures)).update(attempts=1)


def run_for_a_while(future: Future, *, times: int = 1) -> None:
    """Move its start back by this many multiples of the suspects' time, and a moment."""
    long_ago = timezone.now() - timedelta(seconds=times * SUSPECT_SECONDS + 1)
    Future.objects.filter(pk=future.pk, state="running").update(started_at=long_ago)


def test_a_suspect_is_claimed_alone(
    submit: SubmitFactory, lane_factory: Callable[..., Lane], worker: Worker
) -> None:
    submit(lane_factory())
    second, third = lane_factory(), lane_factory()
    suspects = [submit(second), submit(third)]
    suspect(*suspects)
    submit(second)

    first = claim(worker)
    assert keys(first) == [suspects[0].pk]
    assert claim(worker) == []
    finish(worker, *first)
    then = claim(worker)
    assert keys(then) == [suspects[1].pk]
    finish(worker, *then)
    assert len(claim(worker)) == 2


def test_nothing_joins_a_suspect_while_it_runs(submit: SubmitFactory, worker: Worker) -> None:
    suspicious = submit()
    suspect(suspicious)
    [running] = claim(worker)
    submit()

    assert claim(worker) == []
    assert worker.more_waits
    finish(worker, running)
    assert len(claim(worker)) == 1


def test_a_suspect_waits_until_the_worker_holds_nothing(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    submit()
    held = claim(worker)
    suspicious = submit(lane)
    suspect(suspicious)
    submit()

    assert claim(worker) == []
    assert worker.more_waits
    finish(worker, *held)
    assert keys(claim(worker)) == [suspicious.pk]


@pytest.mark.parametrize("history", [{"attempts": 1}, {"interruptions": SUSPECT_INTERRUPTIONS}])
def test_who_has_run_for_some_seconds_after_a_first_suspicion_is_trusted_again(
    history: dict[str, int], submit: SubmitFactory, worker: Worker
) -> None:
    long, next_suspect = submit(), submit()
    Future.objects.filter(pk__in=keys([long, next_suspect])).update(**history)
    other = submit()
    assert keys(claim(worker)) == [long.pk]
    assert claim(worker) == []
    run_for_a_while(long)

    assert keys(claim(worker)) == [next_suspect.pk], "it was not alone with the other yet"
    assert claim(worker) == []
    run_for_a_while(next_suspect)
    assert keys(claim(worker)) == [other.pk]


@pytest.mark.parametrize("history", [{"attempts": 2}, {"interruptions": SUSPECT_INTERRUPTIONS + 1}])
def test_who_is_suspected_twice_is_trusted_again_after_twice_the_time(
    history: dict[str, int], submit: SubmitFactory, worker: Worker
) -> None:
    suspicious = submit()
    Future.objects.filter(pk=suspicious.pk).update(**history)
    other = submit()
    claim(worker)
    run_for_a_while(suspicious)
    assert claim(worker) == []
    run_for_a_while(suspicious, times=2)

    assert keys(claim(worker)) == [other.pk]


@pytest.mark.parametrize("history", [{"attempts": 3}, {"interruptions": SUSPECT_INTERRUPTIONS + 2}])
def test_who_is_suspected_more_often_runs_alone_to_its_end(
    history: dict[str, int], submit: SubmitFactory, worker: Worker
) -> None:
    suspicious = submit()
    Future.objects.filter(pk=suspicious.pk).update(**history)
    submit()
    running = claim(worker)
    run_for_a_while(suspicious, times=100)

    assert claim(worker) == []
    finish(worker, *running)
    assert len(claim(worker)) == 1


@pytest.mark.parametrize(("times", "counts"), [(0, [2, 0, 0]), (1, [2, 1, 0]), (2, [2, 1, 1, 0])])
def test_a_poisonous_future_is_found_out_however_long_it_takes_to_work(
    times: int,
    counts: list[int],
    submit: SubmitFactory,
    worker_factory: Callable[..., Worker],
) -> None:
    """It brings workers down at once, or when it is trusted again: how often, costs crashes."""
    poison, others = submit(), [submit() for _ in range(2)]
    batch_mates = []
    for _ in counts:
        worker = worker_factory()
        claim(worker)
        if times:
            run_for_a_while(poison, times=times)
        claim(worker)
        batch_mates.append(Future.objects.filter(state="running").exclude(pk=poison.pk).count())
        kill(worker)
    worker_factory()

    assert batch_mates == counts
    poison.refresh_from_db()
    assert (poison.state, poison.error_code) == ("failed", "CrashedWorker")
    spared = Future.objects.filter(pk__in=keys(others))
    assert set(spared.values_list("state", flat=True)) == {"pending"}


def test_a_suspect_that_may_not_run_yet_holds_nobody_up(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    suspect(submit(lane, seq_id=2))
    other = submit()

    assert keys(claim(worker)) == [other.pk]


def test_a_suspect_never_overtakes_its_lane(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    first, second = submit(lane), submit(lane)
    suspect(second)

    alone = claim(worker)
    assert keys(alone) == [first.pk]
    finish(worker, *alone)
    assert keys(claim(worker)) == [second.pk]
