"""Submitting: numbers, repeats, limits; and the doorbell in the same transaction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.db import IntegrityError, transaction
from django_q.models import OrmQ

from futures.cancelling import future_cancel
from futures.errors import (
    FutureNotFound,
    FuturePayloadPruned,
    IdempotencyKeyReused,
    LaneNumberedByClient,
    QueueFull,
    SeqIdReused,
)
from futures.models import Future, Lane
from futures.payload import decode
from futures.resubmitting import future_resubmit
from futures.services import Refusal
from futures.transitions import State
from tests.futures.conftest import QUEUE, SubmitFactory

pytestmark = pytest.mark.django_db


def test_what_was_submitted_is_what_the_row_says(
    submit: SubmitFactory, lane: Lane, settings: Any
) -> None:
    first = submit()
    future = submit(
        lane, payload={"a": [1, 2]}, cost=7, summary={"tokens": 2}, kind="sub", replay_of=first
    )

    row = Future.objects.get(pk=future.pk)
    assert (row.state, row.kind, row.cost, row.summary) == ("pending", "sub", 7, {"tokens": 2})
    assert (row.lane_id, row.seq_id, row.owner_id) == (lane.pk, 1, lane.owner_id)
    assert (row.replay_of_id, row.attempts, row.queue) == (first.pk, 0, QUEUE)
    assert decode(bytes(row.payload)) == {"a": [1, 2]}
    assert row.created_at == future.created_at
    assert (future.seq_id, future.is_final, bool(future.worker_id)) == (1, False, False)


def test_each_submission_puts_one_signed_doorbell_into_its_queue(
    submit: SubmitFactory, settings: Any
) -> None:
    submit()
    submit()

    doorbells = OrmQ.objects.filter(key=QUEUE)
    assert [bell.task["func"] for bell in doorbells] == [settings.FUTURES_TASK] * 2
    assert [bell.task["args"] for bell in doorbells] == [(QUEUE,)] * 2
    assert len({bell.task["id"] for bell in doorbells}) == 2


def test_the_server_numbers_a_lane_from_one(submit: SubmitFactory, lane: Lane) -> None:
    assert [submit(lane).seq_id for _ in range(3)] == [1, 2, 3]


def test_the_servers_numbers_go_on_after_a_clients(submit: SubmitFactory, lane: Lane) -> None:
    submit(lane, seq_id=1)
    submit(lane, seq_id=2)

    assert submit(lane, payload={"number": 3}).seq_id == 3
    assert submit(lane, payload={"number": 3}).seq_id == 4


def test_a_repeated_seq_id_returns_the_first_future(submit: SubmitFactory, lane: Lane) -> None:
    first = submit(lane, seq_id=5, payload={"a": 1, "b": 2})

    again = submit(lane, seq_id=5, payload={"b": 2, "a": 1})

    assert again.pk == first.pk
    assert Future.objects.count() == OrmQ.objects.count() == 1


@pytest.mark.parametrize("other", [{"payload": {"number": 2}}, {"kind": "sub"}])
def test_a_reused_seq_id_is_refused(
    submit: SubmitFactory, lane: Lane, other: dict[str, Any]
) -> None:
    submit(lane, seq_id=5)

    with pytest.raises(SeqIdReused):
        submit(lane, seq_id=5, **other)
    assert Future.objects.count() == 1


def test_a_repeated_idempotency_key_consumes_no_seq_id(submit: SubmitFactory, lane: Lane) -> None:
    first = submit(lane, idempotency_key="k")

    assert submit(lane, idempotency_key="k").pk == first.pk
    assert submit(lane).seq_id == 2


def test_a_reused_idempotency_key_is_refused(
    submit: SubmitFactory, lane_factory: Callable[..., Lane]
) -> None:
    lane = lane_factory()
    submit(lane, idempotency_key="k")

    with pytest.raises(IdempotencyKeyReused):
        submit(lane, idempotency_key="k", payload={"number": 2})
    with pytest.raises(IdempotencyKeyReused):
        submit(lane_factory(), idempotency_key="k")
    assert submit(lane).seq_id == 2


def test_owners_do_not_share_idempotency_keys(
    submit: SubmitFactory, owner_factory: Callable[[], Any]
) -> None:
    mine = submit(idempotency_key="k", owner_id=owner_factory().pk)
    theirs = submit(idempotency_key="k", owner_id=owner_factory().pk)

    assert mine.pk != theirs.pk


def test_a_lane_that_does_not_exist_is_refused(submit: SubmitFactory) -> None:
    with pytest.raises(IntegrityError):
        submit(lane_id="nowhere")


def test_an_ordered_lane_takes_no_seq_id_it_would_never_run(
    submit: SubmitFactory, lane_factory: Callable[..., Lane]
) -> None:
    with pytest.raises(SeqIdReused, match="continues at 1"):
        submit(lane_factory(), seq_id=0)
    assert submit(lane_factory(ordered=False), seq_id=0).seq_id == 0


def test_seq_ids_may_be_as_large_as_the_sdks(
    submit: SubmitFactory, lane_factory: Callable[..., Lane]
) -> None:
    assert submit(lane_factory(ordered=False), seq_id=10**18).seq_id == 10**18


def test_a_full_queue_refuses_new_requests_but_answers_repeats(
    submit: SubmitFactory, lane: Lane, owner_factory: Callable[[], Any]
) -> None:
    first = submit(lane, seq_id=1, max_pending=2)
    submit(max_pending=2)

    with pytest.raises(QueueFull):
        submit(lane, seq_id=2, max_pending=2)
    with pytest.raises(QueueFull):
        submit(lane, max_pending=2)
    assert submit(lane, seq_id=1, max_pending=2).pk == first.pk
    assert submit(owner_id=owner_factory().pk, max_pending=2).state == State.PENDING
    assert OrmQ.objects.count() == 3
    assert submit(lane).seq_id == 2


def test_a_refused_request_consumes_its_seq_id(submit: SubmitFactory, lane: Lane) -> None:
    refused = submit(
        lane, seq_id=1, refusal=Refusal(error="data[0]: empty", error_code="InvalidDatum")
    )

    row = Future.objects.get(pk=refused.pk)
    assert (row.state, row.error, row.category) == ("failed", "data[0]: empty", "user")
    assert row.error_code == "InvalidDatum"
    assert row.finished_at is not None
    assert OrmQ.objects.count() == 1


def test_a_submission_in_an_undone_transaction_leaves_nothing(
    submit: SubmitFactory, lane: Lane
) -> None:
    with transaction.atomic():
        submit(lane)
        transaction.set_rollback(True)
    assert not Future.objects.exists()
    assert not OrmQ.objects.exists()
    assert submit(lane).seq_id == 1


def test_a_repeat_inside_a_transaction_leaves_it_usable(submit: SubmitFactory, lane: Lane) -> None:
    with transaction.atomic():
        first = submit(lane, seq_id=1)
        assert submit(lane, seq_id=1).pk == first.pk
        submit(lane, seq_id=2)
    assert Future.objects.count() == 2


def test_cancelling_ends_a_pending_future_once(submit: SubmitFactory) -> None:
    future = submit()

    cancelled = future_cancel(request_id=future.pk, owner_id=future.owner_id)
    again = future_cancel(request_id=future.pk, owner_id=future.owner_id)

    assert cancelled.state == again.state == State.CANCELLED
    assert cancelled.finished_at == again.finished_at


def test_anothers_future_cannot_be_cancelled(
    submit: SubmitFactory, owner_factory: Callable[[], Any]
) -> None:
    future = submit()

    with pytest.raises(FutureNotFound):
        future_cancel(request_id=future.pk, owner_id=owner_factory().pk)
    future.refresh_from_db()
    assert future.state == State.PENDING


def test_resubmitting_puts_the_same_request_at_the_end_of_its_lane(
    submit: SubmitFactory, lane: Lane
) -> None:
    first = submit(lane, cost=3)
    submit(lane)

    replay = future_resubmit(request_id=first.pk)

    row = Future.objects.get(pk=replay.pk)
    assert (row.seq_id, row.replay_of_id, row.cost, row.kind) == (3, first.pk, 3, first.kind)
    assert bytes(row.payload) == first.payload
    assert bytes(row.payload_digest) == first.payload_digest


def test_a_number_of_the_clients_is_never_taken_by_resubmitting(
    submit: SubmitFactory, lane: Lane
) -> None:
    first = submit(lane, seq_id=1)

    with pytest.raises(LaneNumberedByClient):
        future_resubmit(request_id=first.pk)

    assert submit(lane, seq_id=2).seq_id == 2


def test_a_pruned_or_unknown_future_cannot_be_resubmitted(submit: SubmitFactory) -> None:
    future = submit()
    future_cancel(request_id=future.pk, owner_id=future.owner_id)
    Future.objects.filter(pk=future.pk).update(payload=None)

    with pytest.raises(FuturePayloadPruned):
        future_resubmit(request_id=future.pk)
    with pytest.raises(FutureNotFound):
        future_resubmit(request_id="future_unknown")
