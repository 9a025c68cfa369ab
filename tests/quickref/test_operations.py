"""Behaviour of all operations: three addresses, one meaning; waiting; repeats."""

from __future__ import annotations

import pytest
from django.contrib.auth.models import User
from django.test import RequestFactory

from futures.models import Future
from tests.conftest import local_client
from tinkerapi.api.dialect import is_sdk_dialect

REQUESTS = RequestFactory()
HI = [[{"role": "user", "content": "hi"}]]

# waiting address, async address, legacy address, a good body
OPERATIONS = [
    ("/api/v1/forward", "/api/v1/forward_async", "/fwd", {"model_id": "m", "data": HI}),
    (
        "/api/v1/forward_backward",
        "/api/v1/forward_backward_async",
        "/fwdbwd",
        {"model_id": "m", "data": HI},
    ),
    ("/api/v1/optim_step", "/api/v1/optim_step_async", "/optim_step", {"model_id": "m"}),
    ("/api/v1/add_lora", "/api/v1/add_lora_async", "/add_lora", {"rank": 4}),
    ("/api/v1/sample", "/api/v1/asample", None, {"model_id": "m", "messages": HI[0]}),
    (
        "/api/v1/save_weights",
        "/api/v1/save_weights_async",
        "/save_weights",
        {"model_id": "m", "name": "one"},
    ),
    (
        "/api/v1/save_weights_for_sampler",
        "/api/v1/save_weights_for_sampler_async",
        "/save_weights_for_sampler",
        {"model_id": "m", "name": "one"},
    ),
    (
        "/api/v1/save_weights_external",
        "/api/v1/save_weights_external_async",
        None,
        {"model_id": "m", "name": "one"},
    ),
    (
        "/api/v1/load_weights",
        "/api/v1/load_weights_async",
        "/load_weights",
        {"model_id": "m", "path": "tinker://m/weights/zero"},
    ),
    ("/api/v1/remove_lora", "/api/v1/remove_lora_async", "/remove_lora", {"model_id": "m"}),
]
NAMES = [operation[0].rpartition("/")[2] for operation in OPERATIONS]

ANSWER_KEYS = {
    "forward": {"loss", "num_samples", "num_tokens", "model_id", "backend", "metrics"},
    "forward_backward": {"loss", "num_samples", "num_tokens", "model_id", "backend", "metrics"},
    "optim_step": {"metrics", "model_id", "backend"},
    "add_lora": {"model_id", "base_model", "rank", "alpha"},
    "sample": {"generated_text", "completions", "sequences", "prompt_logprobs", "model_id"},
    "save_weights": {"path", "model_id"},
    "save_weights_for_sampler": {"path", "model_id"},
    "save_weights_external": {"path", "model_id"},
    "load_weights": {"path", "model_id"},
    "remove_lora": {"status", "model_id"},
}


@pytest.fixture
def model(api, work) -> str:
    """A model named m with a checkpoint named zero."""
    api.post("/add_lora", model_id="m", rank=4)
    api.post("/save_weights", model_id="m", name="zero")
    work()
    return "m"


@pytest.mark.parametrize(("waiting", "asynchronous", "legacy", "body"), OPERATIONS, ids=NAMES)
def test_async_and_legacy_addresses_answer_futures_of_the_same_kind(
    api, model, waiting, asynchronous, legacy, body
):
    kinds = set()
    for path in filter(None, [asynchronous, legacy]):
        if "remove" in path:
            api.post("/add_lora", model_id="m")
        answer = api.post(path, **body)
        assert answer.status_code == 200, answer.content
        assert set(answer.json()) == {"request_id", "model_id"}
        assert answer.json()["request_id"].startswith("future_")
        kinds.add(Future.objects.get(pk=answer.json()["request_id"]).kind)

    assert len(kinds) == 1


@pytest.mark.parametrize(("waiting", "asynchronous", "legacy", "body"), OPERATIONS, ids=NAMES)
def test_the_result_is_bare_and_has_the_contracts_fields(
    api, model, work, waiting, asynchronous, legacy, body
):
    request_id = api.post(asynchronous, **body).json()["request_id"]
    work()

    answer = api.post("/retrieve_future", request_id=request_id)

    assert answer.status_code == 200, answer.content
    assert ANSWER_KEYS[waiting.rpartition("/")[2]] <= set(answer.json())


def test_waiting_addresses_answer_results_in_the_order_of_a_training_step(served_api):
    def call(path, /, **body):
        answer = served_api.post(path, **body)
        assert answer.status_code == 200, answer.content
        return answer.json()

    call("/api/v1/add_lora", model_id="m", rank=4)
    before = call("/api/v1/forward_backward", model_id="m", data=HI)
    assert call("/api/v1/optim_step", model_id="m")["metrics"]["step"] == 1
    call("/api/v1/save_weights", model_id="m", name="zero")
    after = call("/api/v1/forward", model_id="m", data=HI)
    call("/api/v1/load_weights", model_id="m", path="tinker://m/weights/zero")
    again = call("/api/v1/forward", model_id="m", data=HI)
    sample = call("/api/v1/sample", model_id="m", prompt="hi", num_samples=2)
    assert call("/api/v1/remove_lora", model_id="m") == {"status": "deleted", "model_id": "m"}

    assert before["num_samples"] == 1
    assert after["loss"] == again["loss"]
    assert len(sample["completions"]) == len(sample["sequences"]) == 2
    assert sample["generated_text"] == sample["completions"][0]


def test_a_waiting_call_that_fails_says_what_retrieve_future_says_with_a_status_of_its_own(
    served_api,
):
    served_api.post("/api/v1/add_lora", model_id="m", rank=4)
    served_api.post("/api/v1/save_weights", model_id="m", name="taken")

    failed = served_api.post("/api/v1/save_weights", model_id="m", name="taken")
    body = failed.json()
    asked_again = served_api.post("/retrieve_future", request_id=body["request_id"])

    assert failed.status_code == 409
    assert asked_again.status_code == 500
    assert body == asked_again.json()
    assert body["detail"].startswith("Job failed: ")
    assert body["category"] == "user"
    assert body["error_code"] == "CheckpointExists"
    assert "Traceback" not in body["detail"]


TOO_LONG = {"messages": [{"role": "user", "content": "a" * 600}]}
DATUM = {"model_input": [1, 2], "loss_fn_inputs": {"target_tokens": [2, 3], "weights": [1, 1]}}
NO_TOKEN = {**DATUM, "model_input": [1, 70_000]}
CROSSED = {
    "target_tokens": [2, 3],
    "logprobs": [-1, -1],
    "advantages": [1, 1],
    "clip_low_threshold": [0.8, 2],
    "clip_high_threshold": [1.2, 1],
}


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("forward_backward", {"data": [NO_TOKEN]}, "data[0].model_input[1]: token 70000 is not"),
        ("forward", {"data": [DATUM, NO_TOKEN]}, "data[1].model_input[1]: token 70000 is not"),
        (
            "forward_backward",
            {"data": [{**DATUM, "loss_fn_inputs": CROSSED}], "loss_fn": "ppo"},
            "data[0].loss_fn_inputs.clip_low_threshold[1]: above clip_high_threshold",
        ),
        ("forward_backward", {"data": HI, "train_on": "assistant"}, "data[0]: train_on: "),
        (
            "forward_backward",
            {"data": [HI[0], TOO_LONG]},
            "data[1]: the conversation is 606 tokens once rendered, and the model reads",
        ),
        ("sample", {"prompt": "a" * 600}, "prompt: 600 tokens"),
        ("sample", TOO_LONG, "prompt: "),
    ],
)
def test_a_mistake_that_the_worker_finds_is_a_400_of_the_waiting_call(
    served_api, path, body, sentence
):
    served_api.post("/api/v1/add_lora", model_id="m", rank=4)

    answer = served_api.post(f"/api/v1/{path}", model_id="m", **body)

    assert answer.status_code == 400, answer.content
    error = answer.json()
    assert set(error) == {"detail", "request_id", "error_code", "category"}
    assert error["detail"].startswith(f"Job failed: {sentence}"), error["detail"]
    assert error["category"] == "user"
    asked_again = served_api.post("/retrieve_future", request_id=error["request_id"])
    assert asked_again.status_code == 500
    assert asked_again.json() == error


def test_a_waiting_call_past_its_deadline_answers_202_and_nothing_is_lost(
    transactional_db, start_worker
):
    client = local_client()
    body = {"rank": 4, "wait": 0.01}
    late = client.post("/api/v1/add_lora", body, content_type="application/json")

    assert late.status_code == 202
    assert late.json()["status"] == "pending"
    start_worker()()
    question = {"request_id": late.json()["request_id"]}
    answer = client.post("/retrieve_future", question, content_type="application/json")
    assert answer.status_code == 200
    assert answer.json()["rank"] == 4


def test_a_repeated_idempotency_key_answers_the_first_future(api, model):
    body = {"model_id": "m", "data": HI}
    headers = {"Idempotency-Key": "step 1"}

    first, second = (api.post("/fwdbwd", headers=headers, **body).json() for _ in range(2))

    assert first == second
    assert Future.objects.filter(kind="forward_backward").count() == 1


def test_an_idempotency_key_for_another_request_is_a_409(api, model):
    headers = {"Idempotency-Key": "step 1"}
    api.post("/optim_step", headers=headers, model_id="m")

    answer = api.post("/fwdbwd", headers=headers, model_id="m", data=HI)

    assert answer.status_code == 409
    assert answer.json()["error_code"] == "IdempotencyKeyReused"


@pytest.mark.parametrize("key", ["", "x" * 201, "naïve"])
def test_a_bad_idempotency_key_is_refused(api, key):
    answer = api.post("/add_lora", headers={"Idempotency-Key": key})

    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("Idempotency-Key: ")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/optim_step", {}),
        ("/remove_lora", {}),
        ("/save_weights", {"name": "n"}),
        ("/api/v1/asample", {"prompt": "hi"}),
        ("/load_weights", {"path": "tinker://m/weights/zero"}),
        ("/get_info", {}),
    ],
)
def test_an_unknown_model_is_a_404_that_names_it(api, path, body):
    answer = api.post(path, model_id="nobody", **body)

    assert answer.status_code == 404
    assert answer.json()["error_code"] == "RunNotFound"
    assert "'nobody'" in answer.json()["detail"]


def test_forward_backward_makes_an_unknown_model_of_exactly_that_name(api):
    answer = api.post("/fwdbwd", model_id="user_123", data=HI)

    assert answer.json()["model_id"] == "user_123"
    assert User.objects.get(username="local").run_set.get().name == "user_123"


def test_an_empty_body_is_enough_where_no_field_is_required(api):
    answer = api.client.post("/add_lora", b"", content_type="")

    assert answer.status_code == 200, answer.content


def test_null_for_an_optional_field_means_the_default(api):
    answer = api.post("/add_lora", base_model=None, rank=None, model_id=None)

    assert answer.status_code == 200
    assert User.objects.get(username="local").run_set.get().rank == 32


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"X-Stainless-Package-Version": "0.38.0"}, {"model_id": "m"}),
        ({}, {"model_id": "m", "seq_id": 1}),
    ],
)
def test_the_sdks_dialect_is_refused_clearly_where_it_is_not_spoken(api, headers, body):
    answer = api.post("/api/v1/optim_step_async", headers=headers, **body)

    assert answer.status_code == 400
    assert answer.json()["detail"] == "this address does not speak the tinker SDK's dialect"


@pytest.mark.parametrize(
    ("request_", "is_sdk"),
    [
        (REQUESTS.post("/", {}, content_type="application/json"), False),
        (REQUESTS.post("/", b"\x0a", content_type="application/x-protobuf"), True),
        (REQUESTS.post("/", headers={"X-Stainless-Package-Version": "0.38.0"}), True),
        (REQUESTS.post("/", headers={"User-Agent": "python-requests"}), False),
    ],
)
def test_headers_tell_the_dialects_apart(request_, is_sdk):
    assert is_sdk_dialect(request_) is is_sdk


@pytest.mark.parametrize(
    "datum",
    [
        {"messages": HI[0]},
        HI[0],
        {
            "model_input": [5, 6],
            "loss_fn_inputs": {"target_tokens": [6, 7], "weights": [0, 0.5]},
        },
        {
            "model_input": {"chunks": [{"tokens": [5]}, {"type": "encoded_text", "tokens": [6]}]},
            "loss_fn_inputs": {
                "target_tokens": {"data": [6, 7], "dtype": "int64", "shape": [2]},
                "weights": {"data": [1, 1], "dtype": "float32"},
            },
        },
    ],
)
def test_every_form_of_a_datum_is_trained_on(api, model, work, datum):
    request_id = api.post("/fwdbwd", model_id="m", data=[datum]).json()["request_id"]
    work()

    answer = api.post("/retrieve_future", request_id=request_id)

    assert answer.status_code == 200, answer.content
    assert answer.json()["num_samples"] == 1


@pytest.mark.parametrize("operation", ["fwd", "fwdbwd"])
def test_no_weights_are_weights_of_1_and_what_is_not_read_is_told(api, model, work, operation):
    def metrics(**inputs):
        inputs = {"target_tokens": [6, 7], **inputs}
        datum = {"model_input": [5, 6], "loss_fn_inputs": inputs}
        request_id = api.post(f"/{operation}", model_id="m", data=[datum]).json()["request_id"]
        work()
        return api.post("/retrieve_future", request_id=request_id).json()["metrics"]

    bare = metrics()
    assert bare == metrics(weights=[1, 1])
    assert metrics(weights=[1, 1], logprobs=[-1, -99999]) == {**bare, "not_read/logprobs:sum": 1}
