"""Wrong requests: each is refused with a sentence that names the field, and costs nothing."""

from __future__ import annotations

import pytest

from futures.models import Future

HI = [[{"role": "user", "content": "hi"}]]
DATUM = {"model_input": [1, 2], "loss_fn_inputs": {"target_tokens": [2, 3], "weights": [1, 1]}}


def datum(**changes):
    return {"model_id": "m", "data": [{**DATUM, **changes}]}


def inputs(**changes):
    return datum(loss_fn_inputs={**DATUM["loss_fn_inputs"], **changes})


STEPS = "/api/v1/forward_backward_async"
OPTIM = "/api/v1/optim_step_async"
ADD = "/api/v1/add_lora_async"
SAMPLE = "/api/v1/asample"

BAD_BODIES = [
    (STEPS, {}, "model_id: this field is required"),
    (STEPS, {"model_id": "m"}, "data: this field is required"),
    (STEPS, {"model_id": "m", "data": HI, "epochs": 3}, "epochs: unknown field; expected model_id"),
    (STEPS, {"model_id": "m", "data": HI, "wait": 3}, "wait: unknown field"),
    (STEPS, {"model_id": 7, "data": HI}, "model_id: expected text of 1 to 128 characters; got 7"),
    (STEPS, {"model_id": "../x", "data": HI}, "model_id: '../x' is not a name"),
    (STEPS, {"model_id": "a/b", "data": HI}, "model_id: 'a/b' is not a name"),
    (STEPS, {"model_id": "a\0b", "data": HI}, "model_id: may not hold the character U+0000"),
    (STEPS, {"model_id": "m", "data": []}, "data: is empty"),
    (STEPS, {"model_id": "m", "data": "hi"}, "data: expected a list of conversations"),
    (STEPS, {"model_id": "m", "data": HI[0]}, "data[0]: is a message; data is a list"),
    (STEPS, {"model_id": "m", "data": [[]]}, "data[0]: has no messages"),
    (STEPS, {"model_id": "m", "data": [7]}, "data[0]: expected a list of messages; got 7"),
    (STEPS, {"model_id": "m", "data": [["hi"]]}, "data[0][0]: expected a message"),
    (STEPS, {"model_id": "m", "data": [[{"role": "user"}]]}, "data[0][0].content: this field is"),
    (
        STEPS,
        {"model_id": "m", "data": [[*HI[0], {"role": "robot", "content": "beep"}]]},
        "data[0][1].role: expected one of system, user, assistant; got 'robot'",
    ),
    (
        STEPS,
        {"model_id": "m", "data": [{"messages": [{"role": "user", "content": None}]}]},
        "data[0].messages[0].content: expected text, or a list of parts; got null",
    ),
    (
        STEPS,
        {"model_id": "m", "data": [[{"role": "user", "content": "hi", "name": "bo"}]]},
        "data[0][0].name: unknown field; expected role, content",
    ),
    (STEPS, {"model_id": "m", "data": HI, "loss_fn": "mse"}, "loss_fn: expected one of cross_ent"),
    (STEPS, {"model_id": "m", "data": HI, "loss_fn": "ppo"}, "data[0]: ppo needs token-level"),
    (
        STEPS,
        {"model_id": "m", "data": HI, "loss_fn_config": {"beta": 1}},
        "loss_fn_config.beta: unknown for cross_entropy",
    ),
    (
        STEPS,
        {"model_id": "m", "data": HI, "loss_fn": "dro"},
        "loss_fn_config.beta: this field is required for dro",
    ),
    (STEPS, {"model_id": "m", "data": HI, "train_on": "user"}, "train_on: expected one of auto"),
    (STEPS, datum(model_input=[]), "data[0].model_input: is empty"),
    (STEPS, datum(model_input=[1, -2]), "data[0].model_input[1]: expected a token id"),
    (STEPS, datum(model_input=[1, True]), "data[0].model_input[1]: expected a token id (a whole"),
    (STEPS, datum(model_input=[1.5, 2]), "data[0].model_input[0]: expected a token id (a whole"),
    (
        STEPS,
        datum(model_input=[1, 2**31]),
        "data[0].model_input[1]: expected a token id (a whole number from 0 to 2147483647); got 21",
    ),
    (STEPS, datum(model_input=[1, 2, 3]), "data[0].loss_fn_inputs.target_tokens: 2 values for 3"),
    (STEPS, datum(loss_fn_inputs={}), "data[0].loss_fn_inputs: is empty; send the"),
    (STEPS, datum(model_input={"chunks": []}), "data[0].model_input.chunks: is empty; send a chu"),
    (STEPS, inputs(weights=[]), "data[0].loss_fn_inputs.weights: is empty; send a number for"),
    (STEPS, inputs(weights=[1]), "data[0].loss_fn_inputs.weights: 1 values for 2 tokens"),
    (STEPS, inputs(weights=[1, "x"]), "data[0].loss_fn_inputs.weights[1]: expected a number"),
    (STEPS, inputs(weights=[1, 1e300]), "data[0].loss_fn_inputs.weights[1]: expected a number th"),
    (
        STEPS,
        inputs(weights=[[1], [1, 2]]),
        "data[0].loss_fn_inputs.weights[1]: expected a list of 1 numbers, as the rows before it; "
        "got a list of 2",
    ),
    (
        STEPS,
        inputs(target_tokens=[[1, 2], [3, "x"]]),
        "data[0].loss_fn_inputs.target_tokens[1][1]: expected a token id",
    ),
    (
        STEPS,
        inputs(target_tokens=[[[1, 2]], [[3, 4]]]),
        "data[0].loss_fn_inputs.target_tokens[0][0]: expected a token id (a whole number from 0 "
        "to 2147483647); got a list",
    ),
    (
        STEPS,
        inputs(target_tokens=[[1, 2, 3]]),
        "data[0].loss_fn_inputs.target_tokens: shape [1, 3] for 2 tokens; expected [2, 3]",
    ),
    (STEPS, inputs(novelty=[1, 1]), "data[0].loss_fn_inputs.novelty: not an input"),
    (
        STEPS,
        inputs(weights={"data": [1, 1], "shape": [3]}),
        "data[0].loss_fn_inputs.weights.shape: [3] does not fit 2 values",
    ),
    (
        STEPS,
        inputs(weights={"data": [1, 1], "dtype": "int64"}),
        "data[0].loss_fn_inputs.weights.dtype: expected 'float32'; got 'int64'",
    ),
    (
        STEPS,
        datum(model_input={"chunks": [{"type": "image", "data": ""}]}),
        "data[0].model_input.chunks[0].format: expected one of png, jpeg, webp; got null",
    ),
    (OPTIM, {"model_id": "m", "adam_params": {"lr": 1}}, "adam_params.lr: unknown field; expected"),
    (
        OPTIM,
        {"model_id": "m", "adam_params": {"learning_rate": -1e-4}},
        "adam_params.learning_rate: expected a number of at least 0 and at most 10000; got -0.0001",
    ),
    (
        OPTIM,
        {"model_id": "m", "adam_params": {"learning_rate": True}},
        "adam_params.learning_rate: expected a number of at least 0 and at most 10000; got true",
    ),
    (
        OPTIM,
        {"model_id": "m", "adam_params": {"beta1": 1}},
        "adam_params.beta1: expected a number of at least 0 and below 1; got 1",
    ),
    (OPTIM, {"model_id": "m", "adam_params": [1]}, "adam_params: expected an object; got a list"),
    (ADD, {"rank": 0}, "rank: expected a whole number of at least 1; got 0"),
    (ADD, {"rank": 10**6}, "rank: 1000000 is too large; this server takes up to 256"),
    (ADD, {"rank": 2**64}, "rank: 1.8446744073709552e+19 is too large; this server takes up to"),
    (ADD, {"seed": 2**63}, "seed: expected a whole number from 0 to 9223372036854775807; got 9"),
    (ADD, {"seed": 2**64}, "seed: expected a whole number from 0 to 9223372036854775807; got 1"),
    (ADD, {"rank": "16"}, "rank: expected a whole number of at least 1; got '16'"),
    (ADD, {"rank": 16.0}, "rank: expected a whole number of at least 1; got 16.0"),
    (ADD, {"alpha": 0}, "alpha: expected a number above 0 and at most 1000000; got 0"),
    (ADD, {"seed": -1}, "seed: expected a whole number of at least 0; got -1"),
    (ADD, {"share_across_experts": "no"}, "share_across_experts: expected true or false"),
    (ADD, {"target_modules": "q_proj"}, "target_modules: expected a list of 1 to 100 module nam"),
    (ADD, {"target_modules": []}, "target_modules: is empty; send at least one module name"),
    (ADD, {"target_modules": ["q"] * 101}, "target_modules: 101 names; this server takes at most"),
    (
        ADD,
        {"train_mlp": False, "train_attn": False, "train_unembed": False},
        "train_mlp, train_attn, train_unembed: at least one of them must be true",
    ),
    (SAMPLE, {"model_id": "m"}, "messages, prompt, prompts: give exactly one of them"),
    (SAMPLE, {"prompt": "a", "prompts": ["b"]}, "messages, prompt, prompts: give exactly one"),
    (SAMPLE, {"prompt": "a"}, "model_id, base_model, model_path: give exactly one of them"),
    (SAMPLE, {"prompt": ""}, "prompt: is empty"),
    (SAMPLE, {"prompt": {}}, "prompt.chunks: expected a list of chunks; got null"),
    (SAMPLE, {"messages": {}}, "messages.messages: expected a list of messages; got null"),
    (SAMPLE, {"messages": "hi"}, "messages: expected a list of messages; got 'hi'"),
    (SAMPLE, {"prompts": [{"messages": []}]}, "prompts[0].messages: has no messages"),
    (SAMPLE, {"prompts": []}, "prompts: is empty; send at least one prompt"),
    (SAMPLE, {"prompts": "a"}, "prompts: expected a list of at least one prompt; got 'a'"),
    (SAMPLE, {"prompt": 7}, "prompt: expected text, a list of token ids, or a list of messages"),
    (SAMPLE, {"prompts": ["a", [1, "b"]]}, "prompts[1][1]: expected a token id"),
    (SAMPLE, {"prompt": "a", "num_samples": 0}, "num_samples: expected a whole number of at least"),
    (SAMPLE, {"prompt": "a", "num_samples": 999}, "num_samples: 999 is too many"),
    (SAMPLE, {"prompt": "a", "num_samples": 2**64}, "num_samples: 1.8446744073709552e+19 is too"),
    (SAMPLE, {"prompts": ["a"] * 9, "num_samples": 99}, "num_samples: 891 sequences in all"),
    (
        SAMPLE,
        {"prompt": "a", "sampling_params": {"temperature": -1}},
        "sampling_params.temperature: expected a number of at least 0 and at most 100; got -1",
    ),
    (
        SAMPLE,
        {"prompt": "a", "sampling_params": {"top_p": 0}},
        "sampling_params.top_p: expected a number above 0 and at most 1; got 0",
    ),
    (
        SAMPLE,
        {"prompt": "a", "sampling_params": {"top_k": 0}},
        "sampling_params.top_k: expected -1 (no limit) or a whole number from 1 to 2147483647; got",
    ),
    (
        SAMPLE,
        {"prompt": "a", "sampling_params": {"stop": ["x"] * 65}},
        "sampling_params.stop: 65 entries; this server takes at most 64",
    ),
    (
        SAMPLE,
        {"prompt": "a", "sampling_params": {"stop": [2**31]}},
        "sampling_params.stop[0]: expected all texts of 1 to 200 characters, or all token ids from"
        " 0 to 2147483647; got 2147483648",
    ),
    (
        SAMPLE,
        {"prompt": "a", "sampling_params": {"stop": ["x", 1]}},
        "sampling_params.stop[1]: expected all texts",
    ),
    (
        SAMPLE,
        {"prompt": "a", "model_path": "/etc/passwd"},
        "model_path: '/etc/passwd' is not a checkpoint path",
    ),
    (
        "/save_weights",
        {"model_id": "m"},
        "name: this field is required",
    ),
    (
        "/save_weights",
        {"model_id": "m", "name": "n", "user_metadata": {"a": 1}},
        "user_metadata.a: expected text",
    ),
    (
        "/save_weights",
        {"model_id": "m", "name": "n", "user_metadata": {str(n): "a" for n in range(51)}},
        "user_metadata: 51 names; this server takes at most 50",
    ),
    (
        "/save_weights",
        {"model_id": "m", "name": "n", "ttl_seconds": 0},
        "ttl_seconds: expected a whole number from 1 to 315360000; got 0",
    ),
    ("/load_weights", {"model_id": "m"}, "path: this field is required"),
    ("/retrieve_future", {}, "request_id: this field is required"),
    ("/retrieve_future", {"request_id": ["x"]}, "request_id: expected text"),
    (
        "/retrieve_future",
        {"request_id": "future_0", "wait": "long"},
        "wait: expected a number of at least 0; got 'long'",
    ),
    ("/get_info", {}, "model_id: this field is required"),
]


@pytest.mark.parametrize(("path", "body", "sentence"), BAD_BODIES)
def test_a_wrong_field_is_refused_by_name(api, path, body, sentence):
    answer = api.post(path, **body)

    assert answer.status_code == 400, answer.content
    error = answer.json()
    assert error["detail"].startswith(sentence), error["detail"]
    assert error["category"] == "user"
    assert len(error["detail"]) < 300
    assert not Future.objects.exists()


@pytest.mark.parametrize(
    ("path", "where", "number", "expected"),
    [
        (OPTIM, "adam_params.learning_rate", 1e300, "of at least 0 and at most 10000"),
        (OPTIM, "adam_params.learning_rate", 10001, "of at least 0 and at most 10000"),
        (OPTIM, "adam_params.eps", 1e40, "of at least 0 and at most 10000"),
        (OPTIM, "adam_params.weight_decay", 1e5, "of at least 0 and at most 10000"),
        (OPTIM, "adam_params.grad_clip_norm", 1e39, "that a float32 can hold"),
        (OPTIM, "adam_params.grad_clip_norm", -1e39, "of at least 0"),
        (OPTIM, "adam_params.beta1", 1e300, "of at least 0 and below 1"),
        (ADD, "alpha", 1e308, "above 0 and at most 1000000"),
        (ADD, "alpha", 1_000_001, "above 0 and at most 1000000"),
        (STEPS, "loss_fn_config.beta", 1e40, "that a float32 can hold"),
        (STEPS, "loss_fn_config.beta", -1e40, "that a float32 can hold"),
        (STEPS, "loss_fn_config.beta", "x", ""),
        (SAMPLE, "sampling_params.temperature", 1e300, "of at least 0 and at most 100"),
    ],
)
def test_a_number_that_nobody_can_mean_is_refused_with_its_bound(
    api, path, where, number, expected
):
    body = number
    for name in reversed(where.split(".")):
        body = {name: body}
    required = {STEPS: {"model_id": "m", "data": HI}, OPTIM: {"model_id": "m"}}.get(path, {})

    answer = api.post(path, **required, **body)

    assert answer.status_code == 400
    sentence = f"{where}: expected a number {expected}".rstrip()
    assert answer.json()["detail"] == f"{sentence}; got {number!r}"


def test_the_largest_numbers_that_a_float32_holds_are_taken(api):
    api.post("/add_lora", model_id="m", alpha=1e6)
    params = {"learning_rate": 1e4, "eps": 1e4, "weight_decay": 1e4, "grad_clip_norm": 3.4e38}

    answer = api.post(OPTIM, model_id="m", adam_params=params)

    assert answer.status_code == 200, answer.content


BAD_BYTES = [
    (b"{", 400, "The body is not valid JSON: "),
    (b'{"model_id": "m",}', 400, "The body is not valid JSON: trailing comma"),
    (
        b'{"model_id": NaN}',
        400,
        "The body is not valid JSON: NaN is not a JSON number, in 'model_id' (line 1, column 14).",
    ),
    (
        b'{"wait":\n -Infinity}',
        400,
        "The body is not valid JSON: Infinity is not a JSON number, in 'wait' (line 2, column 3).",
    ),
    (
        b'{"weights": [[1, 2.5e-3], [-1, NaN]]}',
        400,
        "The body is not valid JSON: NaN is not a JSON number, in 'weights' (line 1, column 32).",
    ),
    (
        b'{"a": [' + b"0.125, " * 1000 + b"NaN]}",
        400,
        "The body is not valid JSON: NaN is not a JSON number (line 1, column 7008).",
    ),
    (
        b'["the \\"x\\": ", NaN]',
        400,
        "The body is not valid JSON: NaN is not a JSON number (line 1, column 17).",
    ),
    (b'{"model_id": "\xff"}', 400, "The body is not valid JSON: "),
    (b'{"model_id": "\\ud800"}', 400, "The body is not valid JSON: "),
    (b"[]", 400, "The body must be a JSON object"),
    (b"[" * 32, 400, "The body is not valid JSON: "),
    (b"[" * 100_000, 400, "The body nests lists and objects more than 32 deep"),
    (b"", 400, "request_id: this field is required"),
]


@pytest.mark.parametrize(("body", "status", "sentence"), BAD_BYTES)
def test_malformed_json_is_refused_with_its_position(api, body, status, sentence):
    answer = api.client.post("/retrieve_future", body, content_type="application/json")

    assert answer.status_code == status
    assert answer.json()["detail"].startswith(sentence), answer.json()["detail"]


def test_the_position_of_malformed_json_is_line_and_column(api):
    body = b'{"model_id": "m",\n "data": x}'
    answer = api.client.post("/fwdbwd", body, content_type="application/json")

    assert "(line 2, column 10)" in answer.json()["detail"]


def test_a_body_over_the_limit_is_refused_and_the_limit_named(api, settings):
    settings.MAX_BODY_BYTES = 1000

    answer = api.post("/fwdbwd", model_id="m", data="x" * 1000)

    assert answer.status_code == 413
    assert "larger than 1000 bytes" in answer.json()["detail"]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded"])
def test_another_content_type_is_refused(api, content_type):
    answer = api.client.post("/fwdbwd", b'{"model_id": "m"}', content_type=content_type)

    assert answer.status_code == 415
    expected = f"Content-Type: expected application/json; got '{content_type}'"
    assert answer.json()["detail"] == expected


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_a_compressed_body_is_refused_by_name(api, encoding):
    answer = api.post("/fwdbwd", headers={"Content-Encoding": encoding}, model_id="m")

    assert answer.status_code == 415
    assert answer.json()["detail"].startswith(f"Content-Encoding: '{encoding}' is not supported")


@pytest.mark.parametrize("method", ["get", "put", "patch", "delete"])
def test_a_wrong_method_is_refused_and_the_right_ones_named(api, method):
    answer = getattr(api.client, method)("/fwdbwd")

    assert answer.status_code == 405
    assert answer["Allow"] == "POST, OPTIONS"
    assert "POST" in answer.json()["detail"]


def test_an_unknown_address_is_a_404_in_json(api):
    answer = api.get("/api/v1/nothing")

    assert answer.status_code == 404
    assert answer.json()["error_code"] == "NotFound"


def test_an_unknown_base_model_is_a_404_that_lists_the_known(api):
    answer = api.post("/api/v1/add_lora_async", base_model="gpt-5")

    assert answer.status_code == 404
    assert "'gpt-5' is not served here; choose one of" in answer.json()["detail"]


@pytest.mark.parametrize(
    "limit", [("MAX_DATUMS", HI * 2), ("MAX_DATUM_TOKENS", [DATUM])], ids=lambda item: item[0]
)
def test_a_limit_names_itself(api, settings, limit):
    setting, data = limit
    setattr(settings, setting, 1)

    answer = api.post("/fwdbwd", model_id="m", data=data)

    assert answer.status_code == 400
    assert answer.json()["error_code"] == "LimitExceeded"
    assert "2 datums; this server takes 1" in answer.json()["detail"] or (
        "data[0].model_input: 2 tokens; this server takes 1" in answer.json()["detail"]
    )


def test_the_next_good_request_works_after_bad_ones(api, work):
    for path, body, _ in BAD_BODIES[:5]:
        api.post(path, **body)

    request_id = api.post("/fwdbwd", model_id="m", data=HI).json()["request_id"]
    work()

    assert api.post("/retrieve_future", request_id=request_id).status_code == 200
