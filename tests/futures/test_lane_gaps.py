"""Requests behind a number that never arrives fail with the reason, and no others do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta

import pytest
from django.utils import timezone

from futures.claiming import future_claim
from futures.lane_gaps import gaps_refuse
from futures.models import Future, Lane, Worker
from tests.futures.conftest import QUEUE, SubmitFactory, finish

pytestmark = pytest.mark.django_db


def claim(worker: Worker) -> list[Future]:
    return future_claim(worker=worker, max_futures=10, max_cost=10)


def age(*futures: Future, seconds: float) -> None:
    Future.objects.filter(pk__in=[future.pk for future in futures]).update(
        created_at=timezone.now() - timedelta(seconds=seconds)
    )


def states(futures: Iterable[Future]) -> list[str]:
    return [Future.objects.get(pk=future.pk).state for future in futures]


def test_what_waits_too_long_behind_a_gap_fails_with_the_missing_number(
    submit: SubmitFactory, lane: Lane, worker: Worker
) -> None:
    first, third, fourth = (submit(lane, seq_id=seq_id) for seq_id in (1, 3, 4))
    finish(worker, *claim(worker))
    age(first, third, seconds=61)

    assert gaps_refuse(queue=QUEUE, patience_seconds=60) == 1

    assert states([first, third, fourth]) == ["ready", "failed", "pending"]
    row = Future.objects.get(pk=third.pk)
    assert (row.error, row.category, row.error_code) == (
        "This request waited for seq_id 2, which never arrived.",
        "user",
        "SeqIdMissing",
    )
    submit(lane, seq_id=2)
    assert [future.seq_id for future in claim(worker)] == [2, 4]


def test_what_only_waits_for_the_worker_is_left_alone(
    submit: SubmitFactory, lane_factory: Callable[..., Lane], worker: Worker
) -> None:
    ordered, unordered = lane_factory(), lane_factory(ordered=False)
    waiting = [submit(ordered), submit(ordered), submit(unordered, seq_id=5), submit()]
    age(*waiting, seconds=9999)

    assert gaps_refuse(queue=QUEUE, patience_seconds=60) == 0
    assert len(claim(worker)) == 4
    later = submit(ordered)
    age(later, seconds=9999)
    assert gaps_refuse(queue=QUEUE, patience_seconds=60) == 0


def test_another_queue_is_left_alone(
    submit: SubmitFactory, lane_factory: Callable[..., Lane]
) -> None:
    stuck = submit(lane_factory(queue="other"), queue="other", seq_id=2)
    age(stuck, seconds=9999)

    assert gaps_refuse(queue=QUEUE, patience_seconds=60) == 0
    assert gaps_refuse(queue="other", patience_seconds=60) == 1
