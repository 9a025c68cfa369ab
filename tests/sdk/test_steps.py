"""forward_backward, forward and optim_step, in the forms of new clients and of old ones."""

from __future__ import annotations

from typing import Any

import pytest

from futures.models import Future
from futures.payload import decode
from tests.conftest import InProcessWorker
from tests.sdk.conftest import SdkClient
from tests.sdk.official_sdk import sdk_datum
from training.types import AdamParams

JSON_DATUM = {
    "model_input": {"chunks": [{"tokens": [1, 2, 3]}]},
    "loss_fn_inputs": {
        "target_tokens": {"data": [2, 3, 4], "dtype": "int64", "shape": [3]},
        "weights": {"data": [1.0, 1.0, 1.0], "dtype": "float32", "shape": [3]},
    },
}


def payload_of(answer: Any) -> dict[str, Any]:
    """The request that the worker gets."""
    future = Future.objects.get(pk=answer.json()["request_id"])
    payload: dict[str, Any] = decode(bytes(future.payload))
    return payload


def test_json_of_an_old_client_asks_for_the_same_as_protobuf(sdk: SdkClient) -> None:
    protobuf = sdk.forward_backward(sdk.model(), 1)
    json = sdk.post(
        "forward_backward",
        model_id=sdk.model(),
        seq_id=1,
        forward_backward_input={"data": [JSON_DATUM], "loss_fn": "cross_entropy"},
        type=None,
    )

    digests = Future.objects.filter(seq_id=1).values_list("payload_digest", flat=True).distinct()
    assert payload_of(protobuf)["loss_fn"] == payload_of(json)["loss_fn"] == "cross_entropy"
    assert len(digests) == 1


def test_an_old_clients_forward_and_a_new_ones_flag_leave_the_gradient_alone(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = sdk.model()
    new = sdk.forward_backward(model_id, 1, forward_only=True)
    old = sdk.post(
        "forward",
        model_id=model_id,
        seq_id=2,
        forward_input={"data": [JSON_DATUM], "loss_fn": "cross_entropy"},
    )
    step = sdk.optim_step(model_id, 3)
    work()

    assert sdk.result(new).metrics == sdk.result(old).metrics
    assert sdk.result(step)["metrics"]["grad_norm"] == 0


def test_no_weights_are_weights_of_1_in_both_passes_and_both_forms(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = sdk.model()
    bare = [sdk_datum([1, 2, 3], target_tokens=[2, 3, 4])]
    targets = {"target_tokens": JSON_DATUM["loss_fn_inputs"]["target_tokens"]}
    old_bare = [{**JSON_DATUM, "loss_fn_inputs": targets}]
    answers = [
        sdk.forward_backward(model_id, 1, forward_only=True),
        sdk.forward_backward(model_id, 2, bare, forward_only=True),
        sdk.forward_backward(model_id, 3, bare),
        sdk.post(
            "forward_backward",
            model_id=model_id,
            seq_id=4,
            forward_backward_input={"data": old_bare, "loss_fn": "cross_entropy"},
        ),
    ]
    work()

    first, *others = [sdk.result(answer).metrics for answer in answers]
    assert others == [first] * 3


def test_known_inputs_that_a_loss_does_not_read_are_told_in_the_metrics(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    """Reference log-probabilities of a batch for RL are a usual first phase."""
    model_id = sdk.model()
    inputs = {"weights": [0.0, 1, 1], "logprobs": [0.0, -1, -1], "advantages": [0.0, 1, 2]}
    datum = sdk_datum([1, 2, 3], target_tokens=[2, 3, 4], **inputs)
    scored = sdk.forward_backward(model_id, 1, [datum, datum], forward_only=True)
    trained = sdk.forward_backward(model_id, 2, [datum], loss_fn="ppo")
    work()

    metrics = sdk.result(scored).metrics
    assert metrics["not_read/advantages:sum"] == metrics["not_read/logprobs:sum"] == 2
    assert "not_read/weights:sum" not in metrics
    assert sdk.result(trained).metrics["not_read/weights:sum"] == 1


def test_every_adam_parameter_arrives(sdk: SdkClient) -> None:
    params = {
        "learning_rate": 0.5,
        "beta1": 0.8,
        "beta2": 0.7,
        "eps": 0.1,
        "weight_decay": 0.2,
        "grad_clip_norm": 3.0,
    }
    answer = sdk.optim_step(sdk.model(), 1, **params)

    assert payload_of(answer)["adam_params"] == params


@pytest.mark.parametrize(
    "given",
    [
        {"adam_params": {}},
        {"adam_params": {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12}},
        {"adam_params": {"learning_rate": None}},
    ],
)
def test_the_forms_of_old_clients_mean_the_defaults(sdk: SdkClient, given: Any) -> None:
    answer = sdk.post("optim_step", model_id=sdk.model(), seq_id=1, **given)

    assert AdamParams(**payload_of(answer)["adam_params"]) == AdamParams()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"optimizer_params": {"type": "dimuon", "learning_rate": 0.1}},
            "optimizer_params: this server does not have the optimizer 'dimuon'",
        ),
        ({"adam_params": {"beta1": 1.0}}, "adam_params.beta1: expected a number"),
        (
            {"adam_params": {"learning_rate": 1e300}},
            "adam_params.learning_rate: expected a number of at least 0 and at most 10000",
        ),
        (
            {"adam_params": {"grad_clip_norm": 1e39}},
            "adam_params.grad_clip_norm: expected a number that a float32 can hold; got 1e+39",
        ),
        ({"adam_params": {"nesterov": True}}, "adam_params.nesterov: unknown field"),
        ({"novelty": 1}, "novelty: unknown field"),
    ],
)
def test_what_a_step_cannot_do_is_said_by_its_future(
    sdk: SdkClient, given: Any, sentence: str
) -> None:
    answer = sdk.post("optim_step", model_id=sdk.model(), seq_id=1, **given)

    failure = sdk.result(answer)
    assert failure["error"].startswith(sentence)
    assert failure["category"] == "user"


@pytest.mark.parametrize(
    ("loss_fn", "config", "sentence"),
    [
        ("stable_reinforce", {}, "data[0].model_input_spans: missing"),
        ("cross_entropy", {"beta": 1.0}, "loss_fn_config.beta: "),
        ("ppo", {}, "data[0].loss_fn_inputs"),
    ],
)
def test_what_a_loss_cannot_do_is_said_by_its_future(
    sdk: SdkClient, loss_fn: str, config: dict[str, float], sentence: str
) -> None:
    answer = sdk.forward_backward(sdk.model(), 1, loss_fn=loss_fn, config=config)

    assert sdk.result(answer)["error"].startswith(sentence)


def test_a_body_that_cannot_be_read_is_a_400_with_a_reason(sdk: SdkClient) -> None:
    for content_type, body in (
        ("application/x-protobuf", b"\xff\xff"),
        ("application/json", b"{"),
        ("application/json", b"[]"),
    ):
        answer = sdk.api.client.post(
            "/api/v1/forward_backward", body, content_type=content_type, headers=sdk.headers
        )
        assert answer.status_code == 400
        assert answer.json()["detail"]
