"""Each constraint refuses the row that it is there to refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.db import IntegrityError, transaction
from django.utils import timezone

from futures.models import Future, Lane, Worker
from tests.futures.conftest import SubmitFactory

pytestmark = pytest.mark.django_db

FINAL = {"finished_at": timezone.now()}


@pytest.mark.parametrize(
    ("constraint", "changes"),
    [
        ("future_state_known|future_final_iff_finished_at", {"state": "lost"}),
        ("future_seq_id_iff_lane", {"seq_id": 1}),
        ("future_cost_from_0", {"cost": -1}),
        ("future_running_has_worker", {"state": "running"}),
        ("future_pending_can_run", {"payload": None}),
        ("future_ready_has_result", {"state": "ready", **FINAL}),
        ("future_failed_iff_error", {"state": "failed", "error": "x", **FINAL}),
        ("future_failed_iff_error", {"state": "failed", "category": "user", **FINAL}),
        ("future_failed_iff_error", {"error": "x"}),
        ("future_final_iff_finished_at", {"state": "cancelled"}),
        ("future_final_iff_finished_at", FINAL),
    ],
)
def test_a_future_that_contradicts_itself_is_refused(
    submit: SubmitFactory, constraint: str, changes: dict[str, Any]
) -> None:
    future = submit()

    with pytest.raises(IntegrityError, match=constraint), transaction.atomic():
        Future.objects.filter(pk=future.pk).update(**changes)


def test_what_may_not_be_interrupted_is_not_cancelled_once_a_worker_has_it(
    submit: SubmitFactory, worker: Worker
) -> None:
    future, sample = submit(), submit(interruptible=True)
    cancelled = {"state": "cancelled", "worker": worker, **FINAL}

    with (
        pytest.raises(IntegrityError, match="future_interrupted_if_it_may_be"),
        transaction.atomic(),
    ):
        Future.objects.filter(pk=future.pk).update(**cancelled)
    Future.objects.filter(pk=sample.pk).update(**cancelled)


def test_a_negative_seq_id_is_refused(submit: SubmitFactory, lane: Any) -> None:
    future = submit(lane)

    with pytest.raises(IntegrityError, match="future_seq_id_from_0"), transaction.atomic():
        Future.objects.filter(pk=future.pk).update(seq_id=-1)


def test_a_seq_id_twice_in_a_lane_is_refused(submit: SubmitFactory, lane: Any) -> None:
    submit(lane)
    second = submit(lane)

    with pytest.raises(IntegrityError, match="future_lane_seq_id"), transaction.atomic():
        Future.objects.filter(pk=second.pk).update(seq_id=1)


def test_an_idempotency_key_twice_for_an_owner_is_refused(submit: SubmitFactory) -> None:
    submit(idempotency_key="k")
    second = submit()

    with pytest.raises(IntegrityError, match="future_idempotency_key"), transaction.atomic():
        Future.objects.filter(pk=second.pk).update(idempotency_key="k")


def test_a_lane_without_order_is_leased_to_nobody(
    lane_factory: Callable[..., Lane], worker: Worker
) -> None:
    lane = lane_factory(ordered=False)

    with pytest.raises(IntegrityError, match="lane_leased_if_ordered"), transaction.atomic():
        Lane.objects.filter(pk=lane.pk).update(worker=worker)


def test_an_unknown_worker_state_is_refused(worker: Worker) -> None:
    with pytest.raises(IntegrityError, match="worker_state_known"), transaction.atomic():
        Worker.objects.filter(pk=worker.pk).update(state="asleep")
