"""Requests in any order, again, changed, refused and missing: each runs once, in its place."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.utils import timezone

from futures.lane_gaps import gaps_refuse
from futures.models import Future
from tests.conftest import InProcessWorker
from tests.sdk.conftest import SdkClient
from tests.sdk.official_sdk import sdk_datum
from training.base_models import base_model_get
from training.models import Run

BAD_DATUM = sdk_datum([1, 2, 3], target_tokens=[2, 3, 4], weights=[1.0, 1.0])


def order_of_work(model_id: str) -> list[int]:
    """The model's seq ids in the order in which they were computed."""
    ready = Future.objects.filter(lane_id=model_id, state="ready")
    return list(ready.order_by("batch", "started_at", "seq_id").values_list("seq_id", flat=True))


def test_creation_is_number_0_and_what_follows_begins_at_1(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = sdk.model()
    step = sdk.forward_backward(model_id, 1)
    work()

    assert order_of_work(model_id) == [0, 1]
    assert sdk.result(step).metrics["loss:sum"] != 0


def test_chunks_that_arrive_as_3_4_2_run_in_order_before_the_step(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = sdk.model()
    sdk.forward_backward(model_id, 1)
    work()
    late = [sdk.forward_backward(model_id, seq_id) for seq_id in (3, 4)]
    step = sdk.optim_step(model_id, 5)
    work()
    assert order_of_work(model_id) == [0, 1]

    first = sdk.forward_backward(model_id, 2)
    work()

    assert order_of_work(model_id) == [0, 1, 2, 3, 4, 5]
    for answer in [*late, first]:
        assert len(sdk.result(answer).loss_fn_outputs) == 1
    assert sdk.result(step)["metrics"]["step"] == 1


def test_a_request_sent_again_is_the_same_future_before_and_after_it_ran(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = sdk.model()
    first = sdk.forward_backward(model_id, 1)
    again = sdk.forward_backward(model_id, 1, zstd=True)
    work()
    after = sdk.forward_backward(model_id, 1)

    assert first.json() == again.json() == after.json()
    assert Run.objects.get(pk=model_id).tokens == 3


def test_another_request_under_a_used_number_is_422(sdk: SdkClient, work: InProcessWorker) -> None:
    model_id = sdk.model()
    sdk.forward_backward(model_id, 1)
    other = [sdk_datum([1, 2], target_tokens=[2, 3], weights=[1.0, 1.0])]

    for answer in (
        sdk.forward_backward(model_id, 1, other),
        sdk.forward_backward(model_id, 1, [BAD_DATUM]),
        sdk.optim_step(model_id, 1),
    ):
        assert answer.status_code == 422
        assert answer.json()["error_code"] == "SeqIdReused"


def test_a_refused_request_has_used_its_number_and_the_next_runs(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = sdk.model()
    good = sdk_datum([1, 2], target_tokens=[2, 3], weights=[1.0, 1.0])
    refused = sdk.forward_backward(model_id, 1, [good, BAD_DATUM])
    again = sdk.forward_backward(model_id, 1, [good, BAD_DATUM])
    following = sdk.forward_backward(model_id, 2)
    work()

    assert refused.json() == again.json()
    failure = sdk.result(refused)
    assert failure["category"] == "user"
    assert failure["error"].startswith("data[1].loss_fn_inputs.weights: ")
    assert sdk.result(following).metrics["loss:sum"] != 0


@pytest.mark.parametrize("seq_id", [0, -1, 2**31, "1", None])
def test_a_number_that_cannot_be_is_400(sdk: SdkClient, seq_id: object) -> None:
    answer = sdk.post("optim_step", model_id=sdk.model(), seq_id=seq_id, adam_params={})

    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("seq_id: ")


def test_an_unknown_model_is_404_and_anothers_too(sdk: SdkClient, django_user_model: type) -> None:
    model_id = sdk.model()
    Run.objects.filter(pk=model_id).update(
        owner=django_user_model.objects.create_user("somebody else")
    )

    assert sdk.optim_step("s:train:0", 1).status_code == 404
    assert sdk.optim_step(model_id, 1).status_code == 404
    assert sdk.forward_backward(model_id, 1, [BAD_DATUM]).status_code == 404


def test_who_waits_behind_a_missing_number_is_told_so(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = sdk.model()
    waiting = sdk.forward_backward(model_id, 2)
    work()
    Future.objects.filter(pk=waiting.json()["request_id"]).update(
        created_at=timezone.now() - timedelta(seconds=601)
    )

    assert gaps_refuse(queue=base_model_get(None).queue, patience_seconds=600) == 1

    failure = sdk.result(waiting)
    assert failure["error"] == "This request waited for seq_id 1, which never arrived."


def test_a_restarted_worker_rebuilds_a_model_whose_log_begins_at_0(
    sdk: SdkClient, start_worker
) -> None:
    work = start_worker()
    model_id = sdk.model()
    sdk.forward_backward(model_id, 1)
    work()
    work = start_worker()
    step = sdk.optim_step(model_id, 2, learning_rate=0.1)
    work()

    assert sdk.result(step)["metrics"]["grad_norm"] > 0


def test_the_quick_reference_takes_no_number_of_an_sdk_model(sdk: SdkClient) -> None:
    model_id = sdk.model()

    key = {"X-API-Key": sdk.headers["X-API-Key"]}
    answer = sdk.api.post("/api/v1/optim_step_async", headers=key, model_id=model_id)

    assert answer.status_code == 400
    assert "made by the tinker SDK" in answer.json()["detail"]
    assert sdk.optim_step(model_id, 1).status_code == 200
