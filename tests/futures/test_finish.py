"""The commit point: outcomes become true together, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import transaction

from futures.claiming import future_claim
from futures.errors import Fenced
from futures.finishing import Outcome, futures_finish
from futures.models import Future, Worker
from futures.transitions import State
from tests.futures.conftest import SubmitFactory, finish

pytestmark = pytest.mark.django_db


@pytest.fixture
def running(submit: SubmitFactory, worker: Worker) -> list[Future]:
    for _ in range(3):
        submit(summary={"datums": 2, "loss": 0.0})
    return future_claim(worker=worker, max_futures=10, max_cost=10)


def test_results_and_errors_are_written_to_their_futures(
    worker: Worker, running: list[Future]
) -> None:
    good, bad, other = running
    with transaction.atomic():
        futures_finish(
            worker=worker,
            outcomes=[
                Outcome(
                    request_id=bad.pk,
                    error="data[0]: empty",
                    category="user",
                    error_code="InvalidDatum",
                ),
                Outcome(request_id=good.pk, result=b"\x00\xff", summary={"loss": 0.5}),
            ],
            batch=17,
        )

    good, bad, other = (Future.objects.get(pk=future.pk) for future in running)
    assert (good.state, bytes(good.result), good.error) == ("ready", b"\x00\xff", "")
    assert good.summary == {"datums": 2, "loss": 0.5}
    assert good.batch == bad.batch == 17
    assert good.worker_id == worker.pk
    assert (bad.state, bad.result, bad.error) == ("failed", None, "data[0]: empty")
    assert (bad.category, bad.error_code) == ("user", "InvalidDatum")
    assert bad.summary == {"datums": 2, "loss": 0.0}
    assert good.finished_at is not None
    assert (other.state, other.finished_at) == ("running", None)


def test_an_outcome_of_a_finished_future_undoes_the_whole_batch(
    worker: Worker, running: list[Future]
) -> None:
    finish(worker, running[0])

    with pytest.raises(Fenced):
        finish(worker, *running)
    states = [Future.objects.get(pk=future.pk).state for future in running]
    assert states == [State.READY, State.RUNNING, State.RUNNING]


def test_a_repeated_outcome_in_one_batch_is_refused(worker: Worker, running: list[Future]) -> None:
    with pytest.raises(Fenced):
        finish(worker, running[0], running[0])


def test_another_epoch_cannot_finish(worker: Worker, running: list[Future]) -> None:
    impostor = Worker(pk=worker.pk + 1, queue=worker.queue)

    with pytest.raises(Fenced):
        finish(impostor, running[0])
    assert Future.objects.get(pk=running[0].pk).state == State.RUNNING


def test_finishing_nothing_is_allowed(worker: Worker) -> None:
    finish(worker)


@pytest.mark.django_db(transaction=True)
def test_finishing_outside_a_transaction_is_refused(worker: Worker) -> None:
    with pytest.raises(transaction.TransactionManagementError):
        futures_finish(
            worker=worker, outcomes=[Outcome(request_id="future_x", result=b"")], batch=1
        )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"result": b"", "error": "x", "category": "user"},
        {"error": "x"},
        {"result": b"", "category": "user"},
    ],
    ids=["neither", "both", "no category", "category without error"],
)
def test_an_outcome_is_a_result_or_an_error(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a result, or an error"):
        Outcome(request_id="future_x", **fields)


def test_large_results_survive_byte_by_byte(worker: Worker, running: list[Future]) -> None:
    result = bytes(range(256)) * 8192

    finish(worker, running[0], result=result)

    assert bytes(Future.objects.get(pk=running[0].pk).result) == result
