"""The SDK's JSON is read to the same numbers, defaults written out or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker import types
from tinker.types._pydantic_types.datum import Datum as JsonDatum
from tinker.types._pydantic_types.forward_backward_input import (
    ForwardBackwardInput as JsonForwardBackwardInput,
)
from tinker.types.sample_request import SampleRequest

from tests.sdk.official_sdk import refusal, sdk_body, sdk_datum, sdk_message
from tinkerapi.api.sdk.parse.json_bodies import (
    parse_json_datum,
    parse_json_forward_backward,
    parse_model_input,
    parse_sampling_params,
    parse_tensor_data,
)
from tinkerapi.api.sdk.parse.protobuf import parse_forward_backward
from training.errors import InvalidDatum, InvalidRequest, LimitExceeded
from training.types import Datum, SamplingParams

STYLES: dict[str, dict[str, bool]] = {
    "defaults written, nulls left out": {"exclude_unset": False, "exclude_none": True},
    "defaults left out, nulls written": {"exclude_unset": True, "exclude_none": False},
    "everything written": {"exclude_unset": False, "exclude_none": False},
}
"""How newer SDKs, SDK 0.5 and neither write their models as JSON."""

styles = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES.keys())


def sdk_json_datum(tokens: list[int], **loss_fn_inputs: Any) -> JsonDatum:
    return JsonDatum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=loss_fn_inputs)


def assert_same(got: Datum, wanted: Datum) -> None:
    assert got.model_input.dtype == wanted.model_input.dtype
    np.testing.assert_array_equal(got.model_input, wanted.model_input)
    assert got.loss_fn_inputs.keys() == wanted.loss_fn_inputs.keys()
    for name, array in wanted.loss_fn_inputs.items():
        assert got.loss_fn_inputs[name].dtype == array.dtype
        np.testing.assert_array_equal(got.loss_fn_inputs[name], array)


@styles
@pytest.mark.parametrize(
    "inputs",
    [
        {"target_tokens": [2, 3, 4], "weights": [0, 1.5, -0.1]},
        {"target_tokens": [2, 3, 4], "logprobs": [-0.1, -2, 0.0], "advantages": [1, -1, 0.3]},
        {"target_tokens": np.arange(6).reshape(3, 2), "weights": np.ones((3, 2), np.float32)},
        {"target_tokens": torch.eye(3, 9, dtype=torch.int64), "weights": torch.eye(3, 9) / 3},
    ],
    ids=["flat", "policy", "wide", "sparse"],
)
def test_a_json_datum_is_the_protobuf_datum(inputs: Any, style: dict[str, bool]) -> None:
    model_input = types.ModelInput.from_ints([1, 2, 3])
    message = sdk_message([types.Datum(model_input=model_input, loss_fn_inputs=inputs)])
    (wanted,) = parse_forward_backward(message.SerializeToString()).data

    got = parse_json_datum(
        sdk_json_datum([1, 2, 3], **inputs).model_dump(mode="json", **style), "data[0]"
    )

    assert_same(got, wanted)


@styles
@pytest.mark.parametrize("forward_only", [False, True])
def test_the_call_of_an_old_client_is_the_call_of_a_new_one(
    forward_only: bool, style: dict[str, bool]
) -> None:
    inputs = {"target_tokens": [2, 3], "logprobs": [-1, -2], "advantages": [0.5, -1]}
    config = {"clip_low_threshold": 0.5, "clip_high_threshold": 2}
    new = parse_forward_backward(
        sdk_body(
            [sdk_datum([1, 2], **inputs)],
            loss_fn="ppo",
            config=config,
            seq_id=7,
            forward_only=forward_only,
        )
    )
    given = JsonForwardBackwardInput(
        data=[sdk_json_datum([1, 2], **inputs)], loss_fn="ppo", loss_fn_config=config
    )
    name = "forward_input" if forward_only else "forward_backward_input"
    body = {"model_id": "s:train:0", "seq_id": 7, name: given.model_dump(mode="json", **style)}

    old = parse_json_forward_backward(body, forward_only=forward_only)

    assert (old.model_id, old.seq_id, old.loss_fn) == (new.model_id, new.seq_id, new.loss_fn)
    assert (old.loss_fn_config, old.loss_id) == (new.loss_fn_config, new.loss_id)
    assert old.forward_only is new.forward_only is forward_only
    assert_same(old.data[0], new.data[0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seq_id": None}, "seq_id: expected a whole number from 1"),
        ({"seq_id": "1"}, "seq_id: expected a whole number from 1"),
        ({"model_id": 5}, "model_id: expected text of 1 to 200"),
        ({"hint": 1}, "body.hint: unknown field"),
        ({"forward_backward_input": None}, "forward_backward_input: expected an object; got null"),
        ({"forward_backward_input": {"data": []}}, "loss_fn: expected text"),
        ({"forward_backward_input": {"loss_fn": "ppo", "data": []}}, "data: is empty"),
        ({"forward_backward_input": {"loss_fn": "ppo"}}, "data: expected a list of datums"),
        (
            {"forward_backward_input": {"loss_fn": "ppo", "loss_fn_config": {"a": "b"}}},
            "loss_fn_config.a: expected a number; got 'b'",
        ),
        (
            {"forward_backward_input": {"loss_fn": "ppo", "loss_fn_config": {"a": 10**400}}},
            "loss_fn_config.a: expected a number that a float32 can hold; got 1000",
        ),
        (
            {"forward_backward_input": {"loss_fn": "ppo", "loss_fn_config": [1]}},
            "loss_fn_config: expected an object; got a list",
        ),
    ],
)
def test_a_call_that_is_wrong_is_refused_by_name(change: Any, sentence: str) -> None:
    said = refusal(parse_json_forward_backward, {"model_id": "m", "seq_id": 1, **change})

    assert said is not None
    assert said.startswith(sentence)


@styles
def test_a_prompt_and_its_sampling_params_are_read(style: dict[str, bool]) -> None:
    request = SampleRequest(
        prompt=types.ModelInput(
            chunks=[types.EncodedTextChunk(tokens=[5, 6]), types.EncodedTextChunk(tokens=[7])]
        ),
        sampling_params=types.SamplingParams(
            max_tokens=3, seed=1, stop=["\n"], temperature=0.7, top_k=4, top_p=0.9
        ),
    ).model_dump(mode="json", **style)

    tokens = parse_model_input(request["prompt"], "prompt")
    params = parse_sampling_params(request["sampling_params"], "sampling_params")

    assert tokens.dtype == np.int32
    assert tokens.tolist() == [5, 6, 7]
    assert params == SamplingParams(
        max_tokens=3, seed=1, stop=("\n",), temperature=0.7, top_k=4, top_p=0.9
    )


@styles
def test_sampling_params_that_the_client_left_alone_are_the_defaults(
    style: dict[str, bool],
) -> None:
    sent = types.SamplingParams().model_dump(mode="json", **style)

    assert parse_sampling_params(sent, "sampling_params") == SamplingParams()
    assert parse_sampling_params(None, "sampling_params") == SamplingParams()


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [(None, None), ([], ()), ("END", ("END",)), (["a", "b"], ("a", "b")), ([1, 2], (1, 2))],
)
def test_no_stop_and_an_empty_stop_mean_different_things(stop: Any, wanted: Any) -> None:
    assert parse_sampling_params({"stop": stop}, "p").stop == wanted


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"max_tokens": 0}, "p.max_tokens: expected a whole number from 1 to"),
        ({"max_tokens": True}, "p.max_tokens: expected a whole number from 1 to"),
        ({"seed": -1}, "p.seed: expected a whole number of at least 0; got -1"),
        ({"stop": [1, "a"]}, "p.stop[1]: expected all texts"),
        ({"stop": [""]}, "p.stop[0]: expected all texts"),
        ({"stop": 7}, "p.stop: expected text, or a list"),
        ({"temperature": -0.1}, "p.temperature: expected a number of at least 0"),
        ({"temperature": float("nan")}, "p.temperature: expected a number of at least 0"),
        ({"top_k": 0}, "p.top_k: expected -1 (no limit) or a whole number from 1 to 2"),
        ({"top_p": 0}, "p.top_p: expected a number above 0 and at most 1"),
        ({"min_p": 0.1}, "p.min_p: unknown field"),
        ([], "p: expected an object; got a list"),
    ],
)
def test_sampling_params_out_of_range_are_refused(params: Any, sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_sampling_params(params, "p")
    assert str(caught.value).startswith(sentence)


def test_an_unknown_field_that_holds_nothing_is_left_alone() -> None:
    assert parse_sampling_params({"min_p": None}, "p") == SamplingParams()


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ({"chunks": []}, "prompt: is empty"),
        ({"chunks": [{"tokens": []}]}, "prompt: is empty"),
        ({}, "prompt.chunks: expected a list of chunks; got null"),
        ([1, 2], "prompt: expected an object; got a list"),
        ({"chunks": [7]}, "prompt.chunks[0]: expected a chunk"),
        ({"chunks": [{}]}, "prompt.chunks[0].tokens: expected a list of numbers; got null"),
        ({"chunks": [{"tokens": [1, 2.5]}]}, "prompt.chunks[0].tokens[1]: expected a whole number"),
        ({"chunks": [{"tokens": [True]}]}, "prompt.chunks[0].tokens[0]: expected a whole number"),
        ({"chunks": [{"tokens": [1, -1]}]}, "prompt.chunks[0].tokens[1]: -1 is not a token id"),
        ({"chunks": [{"tokens": [2**31]}]}, "prompt.chunks[0].tokens[0]: 2147483648 is not a"),
        ({"chunks": [{"tokens": [2**70]}]}, "prompt.chunks[0].tokens: a number is too large for"),
        ({"chunks": [{"tokens": [1], "x": 2}]}, "prompt.chunks[0].x: unknown field"),
        ({"chunks": [{"type": "image", "data": ""}]}, "prompt.chunks[0].format: expected one of"),
        ({"chunks": [{"data": "aGk=", "format": "png"}]}, "prompt.chunks[0].data: labelled png"),
        ({"chunks": [{"location": "x"}]}, "prompt.chunks[0]: image_asset_pointer is not"),
        ({"chunks": [{"dmel": "aGk="}]}, "prompt.chunks[0]: dmel (audio) is not supported"),
        ({"chunks": [{"type": "dream"}]}, "prompt.chunks[0]: 'dream' is not supported"),
    ],
)
def test_a_prompt_that_is_no_text_is_refused(prompt: Any, sentence: str) -> None:
    with pytest.raises(InvalidDatum) as caught:
        parse_model_input(prompt, "prompt")
    assert str(caught.value).startswith(sentence)


def test_a_prompt_of_too_many_tokens_is_refused(settings: Any) -> None:
    settings.MAX_DATUM_TOKENS = 2

    with pytest.raises(LimitExceeded, match=r"^prompt: 3 tokens; this server takes 2"):
        parse_model_input({"chunks": [{"tokens": [1, 2, 3]}]}, "prompt")


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        ([1.0], "t: expected an object; got a list"),
        ({"data": [1.0]}, "t.dtype: expected 'float32' or 'int64'; got null"),
        ({"data": [1.0], "dtype": "float64"}, "t.dtype: expected 'float32' or 'int64'"),
        ({"data": [1.5], "dtype": "int64"}, "t.data[0]: expected a whole number; got 1.5"),
        ({"data": ["1"], "dtype": "float32"}, "t.data[0]: expected a number; got '1'"),
        ({"data": [[1.0]], "dtype": "float32"}, "t.data[0]: expected a number; got a list"),
        ({"data": [10**400], "dtype": "float32"}, "t.data: a number is too large for float32"),
        ({"data": [], "dtype": "float32"}, "t: no values"),
        ({"data": [1.0], "dtype": "float32", "shape": [2]}, "t: 1 values for shape [2]"),
        ({"data": [1.0], "dtype": "float32", "shape": ["1"]}, "t.shape: expected a list of sizes"),
        ({"data": [1.0], "dtype": "float32", "shape": [-1]}, "t.shape: [-1] has a size below 1"),
        (
            {"data": [1.0], "dtype": "float32", "shape": [1, 2], "sparse_crow_indices": [0, 1]},
            "t: a sparse array has both crow and col indices",
        ),
        ({"data": [1.0], "dtype": "float32", "strides": [1]}, "t.strides: unknown field"),
    ],
)
def test_what_is_no_tensor_is_refused(tensor: Any, sentence: str) -> None:
    with pytest.raises(InvalidDatum) as caught:
        parse_tensor_data(tensor, "t")
    assert str(caught.value).startswith(sentence)


def test_a_number_beyond_float32_is_refused_in_a_datum() -> None:
    sent = sdk_json_datum([1], target_tokens=[2]).model_dump(mode="json")
    sent["loss_fn_inputs"]["weights"] = {"data": [1e300], "dtype": "float32"}

    place = r"^d\.loss_fn_inputs\.weights\.data\[0\]"
    with pytest.raises(InvalidDatum, match=place + ": expected a number that a float32 can hold"):
        parse_json_datum(sent, "d")


def test_the_unlisted_cells_of_wanted_prompt_logprobs_are_minus_one() -> None:
    wanted = torch.full((4, 9), -1)
    wanted[1, 3] = 17
    sent = types.TensorData.from_torch_sparse(wanted, pad_value=-1)
    body = {
        "data": sent.data,
        "dtype": sent.dtype,
        "shape": sent.shape,
        "sparse_crow_indices": sent.sparse_crow_indices,
        "sparse_col_indices": sent.sparse_col_indices,
    }

    got = parse_tensor_data(body, "target_prompt_logprobs", pad=-1)

    assert sent.sparse_crow_indices is not None
    np.testing.assert_array_equal(got, wanted.numpy())


NAMES = ("data", "dtype", "shape", "sparse_crow_indices", "sparse_col_indices")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    *NAMES,
                    "chunks",
                    "tokens",
                    "type",
                    "model_input",
                    "loss_fn_inputs",
                    "stop",
                    "top_k",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, derandomize=True)
@given(noise=JSON, place=st.integers(0, 6))
def test_json_noise_raises_our_errors_only(noise: Any, place: int) -> None:
    datum = sdk_json_datum([1, 2], target_tokens=[3, 4], weights=[0.5, 1]).model_dump(mode="json")
    tensor = datum["loss_fn_inputs"]["weights"]
    if place < 5:
        tensor[NAMES[place]] = noise
    elif place == 5:
        datum["model_input"] = noise
    else:
        datum["loss_fn_inputs"] = noise

    for parse, value in (
        (parse_json_datum, datum),
        (parse_json_datum, noise),
        (parse_model_input, noise),
        (parse_tensor_data, noise),
        (parse_sampling_params, noise),
    ):
        said = refusal(parse, value, "x")
        assert said is None or said.startswith("x")
