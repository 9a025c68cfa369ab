"""Whose worker died while it ran is run alone, and nobody waits for it longer than that."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from futures.models import Future, Lane, Worker
from tests.futures.conftest import SubmitFactory, finish
from tests.futures.test_claim import claim, keys

pytestmark = pytest.mark.django_db


def suspect(*futures: Future) -> None:
    """As if a worker had died while these ran."""
    Future.objects.filter(pk__in=keys(futures)).update(attempts=1)


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
