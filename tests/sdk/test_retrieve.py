"""retrieve_future and cancel_future: every state of a future, in every form a client reads."""

from __future__ import annotations

import numpy as np
import pytest
from django.utils import timezone

from futures.claiming import future_claim
from futures.models import Future
from tests.conftest import ApiClient, InProcessWorker
from tests.sdk.conftest import SdkClient
from tests.sdk.official_sdk import sdk_datum
from tests.sdk.test_custom_loss_steps import GRAPH, INPUTS
from tests.sdk.test_sampling import new_sampler, sample
from tinkerapi.api.dialect import PROTOBUF
from tinkerapi.api.sdk.views import futures as views


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    async def time_is_up(*args: object, **more: object) -> None:
        return None

    monkeypatch.setattr(views, "future_wait", time_is_up)


def test_a_pending_future_answers_408_with_the_queues_state(
    sdk: SdkClient, no_patience: None
) -> None:
    step = sdk.optim_step(sdk.model(), 1)

    answer = sdk.retrieve(step)

    assert answer.status_code == 408
    assert answer.json() == {
        "type": "try_again",
        "request_id": step.json()["request_id"],
        "queue_state": "paused_capacity",
        "queue_state_reason": "No worker serves this queue at the moment.",
        "queue_position": 1,  # the model's creation
        "estimated_wait_seconds": None,
    }


def test_a_result_is_protobuf_for_who_accepts_it_and_json_for_who_does_not(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    step = sdk.forward_backward(sdk.model(), 1)
    work()

    message = sdk.result(step)
    body = sdk.retrieve(step).json()

    assert set(body) == {"loss_fn_output_type", "loss_fn_outputs", "metrics"}
    assert body["metrics"] == dict(message.metrics)
    [output] = body["loss_fn_outputs"]
    [record] = message.loss_fn_outputs
    np.testing.assert_array_equal(
        np.frombuffer(record.fields["logprobs"].data, np.float32),
        np.array(output["logprobs"]["data"], np.float32),
    )


def test_a_result_is_given_as_often_as_it_is_asked_for(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    step = sdk.forward_backward(sdk.model(), 1)
    work()

    answers = [sdk.retrieve(step, accept=PROTOBUF).content for _ in range(2)]

    assert answers[0] == answers[1]


def test_creation_and_steps_are_json_in_the_sdks_words(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = sdk.model()
    step = sdk.optim_step(model_id, 1, learning_rate=0.5)
    work()
    creation = Future.objects.get(lane_id=model_id, seq_id=0)

    answer = sdk.post("retrieve_future", request_id=creation.pk)
    assert answer.json()["model_id"] == model_id
    metrics = sdk.retrieve(step, accept="application/json").json()["metrics"]
    assert metrics["learning_rate"] == 0.5
    assert "error" not in answer.json()


def test_every_json_result_says_which_request_it_answers(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    session = sdk.session()
    model_id = sdk.model(session)
    asked = {
        "save_weights": {"path": "a"},
        "save_weights_for_sampler": {"path": "a"},
        "save_weights_external": {"path": "a"},
        "optim_step": {"adam_params": {}},
    }
    answers = {
        name: sdk.post(name, model_id=model_id, seq_id=number, **fields)
        for number, (name, fields) in enumerate(asked.items(), 1)
    }
    unnamed = sdk.post(
        "save_weights_for_sampler", model_id=model_id, seq_id=5, sampling_session_seq_id=1
    )
    work()
    answers["load_weights"] = sdk.post(
        "load_weights", model_id=model_id, seq_id=6, path=f"tinker://{model_id}/weights/a"
    )
    work()
    answers["unload_model"] = sdk.post("unload_model", model_id=model_id)
    answers["create_custom_loss"] = sdk.post(
        "create_custom_loss",
        session_id=session,
        custom_loss_seq_id=0,
        name="total",
        inputs=INPUTS,
        graph=GRAPH,
    )
    work()
    creation = Future.objects.get(lane_id=model_id, seq_id=0)

    for name, answer in answers.items():
        assert sdk.result(answer)["type"] == name
    assert sdk.result(unnamed)["type"] == "save_weights_for_sampler"
    assert sdk.post("retrieve_future", request_id=creation.pk).json()["type"] == "create_model"


def test_a_large_result_is_announced_where_that_is_allowed_and_then_given(
    sdk: SdkClient, work: InProcessWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = sdk.forward_backward(sdk.model(), 1)
    work()
    whole = sdk.retrieve(step, accept=PROTOBUF, allow_metadata_only=False)
    small = sdk.retrieve(step, accept=PROTOBUF, allow_metadata_only=True)
    monkeypatch.setattr(views, "METADATA_ONLY_BYTES", len(whole.content))

    announced = sdk.retrieve(step, accept=PROTOBUF, allow_metadata_only=True)
    given = sdk.retrieve(step, accept=PROTOBUF, allow_metadata_only=False)

    assert small.content == whole.content == given.content
    assert announced.json() == {
        "status": "complete_metadata",
        "response_payload_size": len(whole.content),
    }


def test_a_failure_is_a_200_with_its_category_again_and_again(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    # The web cannot know that the vocabulary ends before; the worker does.
    beyond = sdk_datum([1, 10**6], target_tokens=[2, 3], weights=[1.0, 1.0])
    step = sdk.forward_backward(sdk.model(), 1, [beyond])
    work()

    for _ in range(2):
        answer = sdk.retrieve(step, accept=PROTOBUF, allow_metadata_only=True)
        assert answer.status_code == 200
        assert set(answer.json()) == {"error", "category"}
        assert answer.json()["category"] == "user"
        assert answer.json()["error"].startswith("data[0].model_input")


def test_a_cancelled_future_says_so_and_the_lane_goes_on(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = sdk.model()
    unwanted, wanted = sdk.optim_step(model_id, 1), sdk.optim_step(model_id, 2)
    request_id = unwanted.json()["request_id"]

    for _ in range(2):
        assert sdk.post("cancel_future", request_id=request_id).status_code == 204
    work()

    assert sdk.result(unwanted)["category"] == "user"
    assert sdk.result(wanted)["metrics"]["step"] == 1


def test_a_sample_is_cancelled_while_it_runs_and_training_is_not(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    step, sampled = sdk.optim_step(sdk.model(), 1), sample(sdk, new_sampler(sdk))
    future_claim(worker=work.worker, max_futures=100, max_cost=10**6)
    for answer in (step, sampled):
        cancelled = sdk.post("cancel_future", request_id=answer.json()["request_id"])
        assert cancelled.status_code == 204

    states = Future.objects.values_list("kind", "state")
    assert dict(states) == {"create_run": "running", "optim_step": "running", "sample": "cancelled"}
    assert sdk.result(sampled) == {"error": "The request was cancelled.", "category": "user"}


def test_cancelling_too_late_changes_nothing(sdk: SdkClient, work: InProcessWorker) -> None:
    step = sdk.optim_step(sdk.model(), 1)
    work()

    cancelled = sdk.post("cancel_future", request_id=step.json()["request_id"])

    assert cancelled.status_code == 204
    assert sdk.result(step)["metrics"]["step"] == 1


def test_an_unknown_future_is_404_and_anothers_too(sdk: SdkClient, django_user_model: type) -> None:
    step = sdk.optim_step(sdk.model(), 1)
    request_id = step.json()["request_id"]
    Future.objects.filter(pk=request_id).update(
        owner=django_user_model.objects.create_user("somebody else")
    )

    for path in ("retrieve_future", "cancel_future"):
        for name in (request_id, "future_abc"):
            answer = sdk.post(path, request_id=name)
            assert (answer.status_code, answer.json()["error_code"]) == (404, "FutureNotFound")


def test_a_pruned_result_is_410(sdk: SdkClient, work: InProcessWorker) -> None:
    step = sdk.optim_step(sdk.model(), 1)
    work()
    Future.objects.filter(pk=step.json()["request_id"]).update(
        payload=None, result=None, pruned_at=timezone.now()
    )

    assert sdk.retrieve(step).status_code == 410


def test_a_poll_is_answered_as_soon_as_the_future_is_final(served_api: ApiClient) -> None:
    sdk = SdkClient.with_new_key(served_api)
    step = sdk.optim_step(sdk.model(), 1)

    assert sdk.result(step)["metrics"]["step"] == 1
