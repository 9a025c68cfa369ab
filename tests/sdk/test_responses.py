"""The SDK decodes our results to the same numbers, in protobuf and in its old JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tinker.lib.chunked_fwdbwd_helpers import combine_fwd_bwd_output_results
from tinker.proto.response_conv import (
    deserialize_forward_backward_output,
    deserialize_sample_response,
)

from futures.payload import decode, encode
from tinkerapi.api.sdk.render.json_results import forward_backward_output_json, sample_response_json
from tinkerapi.api.sdk.render.protobuf import encode_forward_backward_output, encode_sample_response
from training.errors import InvalidRequest

LOGPROBS = st.floats(width=32, allow_infinity=False)
NAN = float("nan")


def passed(logprobs: list[Any], **metrics: float) -> dict[str, Any]:
    """A forward_backward's result as a future stores it, and as it comes back."""
    result = {
        "loss": 0.5,
        "num_samples": len(logprobs),
        "num_tokens": 9,
        "model_id": "m",
        "backend": "fake",
        "metrics": metrics or {"loss:sum": 2.5, "num_tokens": 9, "perplexity": 1.6},
        "loss_fn_outputs": [{"logprobs": array} for array in logprobs],
    }
    return dict(decode(encode(result)))


def sampled(**more: Any) -> dict[str, Any]:
    sequence = {
        "stop_reason": "length",
        "tokens": np.array([5, 6], np.int32),
        "logprobs": np.array([-0.5, -0.25], np.float32),
        "text": "hi",
    }
    result = {
        "generated_text": "hi",
        "completions": ["hi"],
        "sequences": [sequence],
        "prompt_logprobs": None,
        "model_id": None,
        **more,
    }
    return dict(decode(encode(result)))


@settings(max_examples=50)
@given(data=st.data(), shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), max_size=6))
def test_outputs_of_any_shape_arrive(data: st.DataObject, shapes: list[tuple[int, int]]) -> None:
    sent = [
        data.draw(hnp.arrays(np.float32, (n, k) if k else (n,), elements=LOGPROBS))
        for n, k in shapes
    ]

    got = deserialize_forward_backward_output(encode_forward_backward_output(passed(sent)))

    assert len(got.loss_fn_outputs) == len(sent)
    for output, array in zip(got.loss_fn_outputs, sent, strict=True):
        assert output["logprobs"].shape == list(array.shape)
        np.testing.assert_array_equal(output["logprobs"].to_numpy(), array)


def test_several_fields_and_dtypes_arrive() -> None:
    result = passed([])
    result["loss_fn_outputs"] = [
        {"a": np.array([1, 2], np.int64), "b": np.array([[0.5]], np.float64)},
        {"b": np.array([[1.5], [2.5]], np.float64), "a": np.array([3], np.int32)},
    ]

    got = deserialize_forward_backward_output(encode_forward_backward_output(result))

    assert [output["a"].tolist() for output in got.loss_fn_outputs] == [[1, 2], [3]]
    assert [output["a"].dtype for output in got.loss_fn_outputs] == ["int64", "int64"]
    assert [output["b"].tolist() for output in got.loss_fn_outputs] == [[[0.5]], [[1.5], [2.5]]]


def test_outputs_of_different_fields_are_the_servers_mistake() -> None:
    result = passed([])
    result["loss_fn_outputs"] = [{"a": np.ones(1)}, {"b": np.ones(1)}]

    with pytest.raises(ValueError, match="different fields"):
        encode_forward_backward_output(result)


def test_the_sdk_can_combine_what_several_chunks_answer() -> None:
    first = passed([np.ones(2, np.float32)], **{"loss:sum": 1.0, "x:mean": 1.0, "num_tokens": 2})
    second = passed([np.ones(3, np.float32)] * 3, **{"loss:sum": 2.0, "x:mean": 5.0, "a:b:c": 1})
    chunks = [
        deserialize_forward_backward_output(encode_forward_backward_output(result))
        for result in (first, second)
    ]

    combined = combine_fwd_bwd_output_results(chunks)

    assert combined.metrics == {"loss:sum": 3.0, "x:mean": 4.0}
    assert len(combined.loss_fn_outputs) == 4


def test_a_sample_arrives() -> None:
    prompt_logprobs = np.array([np.nan, -1.5, -0.125], np.float32)

    got = deserialize_sample_response(
        encode_sample_response(sampled(prompt_logprobs=prompt_logprobs))
    )

    (sequence,) = got.sequences
    assert (sequence.stop_reason, sequence.tokens) == ("length", [5, 6])
    assert sequence.logprobs == [-0.5, -0.25]
    assert sequence.topk_logprobs is None
    assert got.prompt_logprobs == [None, -1.5, -0.125]
    assert (got.topk_prompt_logprobs, got.target_prompt_logprobs) == (None, None)
    assert (got.prompt_alt_tokens, got.prompt_cache_hit_tokens) == (None, 0)


@settings(max_examples=50)
@given(
    sequences=st.lists(
        st.tuples(
            st.sampled_from(["stop", "length"]),
            st.lists(st.tuples(st.integers(0, 2**31 - 1), LOGPROBS), min_size=1),
        )
    )
)
def test_any_sequences_arrive(sequences: list[tuple[str, list[tuple[int, float]]]]) -> None:
    sent = [
        {
            "stop_reason": stop_reason,
            "tokens": np.array([token for token, _ in pairs], np.int32),
            "logprobs": np.array([logprob for _, logprob in pairs], np.float32),
        }
        for stop_reason, pairs in sequences
    ]

    got = deserialize_sample_response(encode_sample_response(sampled(sequences=sent)))

    for sequence, (stop_reason, pairs) in zip(got.sequences, sequences, strict=True):
        assert sequence.stop_reason == stop_reason
        assert sequence.tokens == [token for token, _ in pairs]
        np.testing.assert_array_equal(sequence.logprobs_np, np.float32([lp for _, lp in pairs]))


def test_a_sequence_may_be_empty_or_without_logprobs() -> None:
    sequences = [
        {"stop_reason": "stop", "tokens": np.array([], np.int32), "logprobs": np.array([])},
        {"stop_reason": "stop", "tokens": np.array([1], np.int32)},
    ]

    got = deserialize_sample_response(encode_sample_response(sampled(sequences=sequences)))

    assert [sequence.tokens for sequence in got.sequences] == [[], [1]]
    assert [sequence.logprobs for sequence in got.sequences] == [None, None]


TOPK = {
    "token_ids": np.array([[0, 0], [7, 8], [9, 0]], np.int32),
    "logprobs": np.array([[-99999, -99999], [-0.5, -1.5], [-0.25, -99999]], np.float32),
}


def test_top_k_rows_without_data_are_none_and_short_rows_are_short() -> None:
    result = sampled(topk_prompt_logprobs=TOPK)
    result["sequences"][0]["topk_logprobs"] = {k: v[1:] for k, v in TOPK.items()}

    got = deserialize_sample_response(encode_sample_response(result))

    assert got.topk_prompt_logprobs == [None, [(7, -0.5), (8, -1.5)], [(9, -0.25)]]
    assert got.sequences[0].topk_logprobs == [[(7, -0.5), (8, -1.5)], [(9, -0.25)]]


def test_top_k_arrays_of_different_shapes_are_the_servers_mistake() -> None:
    with pytest.raises(ValueError, match="top-k"):
        encode_sample_response(
            sampled(topk_prompt_logprobs={**TOPK, "logprobs": np.zeros((3, 1), np.float32)})
        )


def test_what_else_can_be_asked_of_a_prompt_arrives() -> None:
    target = np.array([[-0.5, 0.0], [-1.0, -2.0]], np.float32)
    tokens, logprobs = np.array([[3], [4]]), np.array([[-0.5], [-0.75]], np.float32)

    got = deserialize_sample_response(
        encode_sample_response(
            sampled(
                target_prompt_logprobs=target,
                prompt_alt_tokens={"tokens": tokens, "logprobs": logprobs},
                prompt_cache_hit_tokens=3,
            )
        )
    )

    assert got.target_prompt_logprobs is not None
    assert got.prompt_alt_tokens is not None
    np.testing.assert_array_equal(got.target_prompt_logprobs.to_numpy(), target)
    assert got.prompt_alt_tokens.tokens.dtype == "int64"
    np.testing.assert_array_equal(got.prompt_alt_tokens.tokens.to_numpy(), tokens)
    np.testing.assert_array_equal(got.prompt_alt_tokens.logprobs.to_numpy(), logprobs)
    assert got.prompt_cache_hit_tokens == 3


def test_the_prompt_logprobs_of_two_prompts_have_no_place() -> None:
    with pytest.raises(InvalidRequest, match="several prompts"):
        encode_sample_response(sampled(prompt_logprobs=[np.ones(2, np.float32)] * 2))


# --- JSON for clients before 0.25 ------------------------------------------------------------


def test_the_json_of_a_pass_says_what_the_protobuf_says() -> None:
    result = passed([np.array([-0.5, -1.0], np.float32), np.array([[-0.25]], np.float32)])
    decoded = deserialize_forward_backward_output(encode_forward_backward_output(result))

    answer = json.loads(json.dumps(forward_backward_output_json(result), allow_nan=False))

    assert answer == {
        "loss_fn_output_type": decoded.loss_fn_output_type,
        "loss_fn_outputs": [
            {
                name: {"data": tensor.data, "dtype": tensor.dtype, "shape": tensor.shape}
                for name, tensor in output.items()
            }
            for output in decoded.loss_fn_outputs
        ],
        "metrics": {"loss:sum": 2.5},
    }


def test_the_json_of_a_sample_says_what_the_protobuf_says() -> None:
    result = sampled(
        prompt_logprobs=np.array([np.nan, -1.5, -0.125], np.float32), topk_prompt_logprobs=TOPK
    )

    answer = json.loads(json.dumps(sample_response_json(result), allow_nan=False))

    assert answer == {
        "sequences": [{"stop_reason": "length", "tokens": [5, 6], "logprobs": [-0.5, -0.25]}],
        "prompt_logprobs": [None, -1.5, -0.125],
        "topk_prompt_logprobs": [None, [[7, -0.5], [8, -1.5]], [[9, -0.25]]],
        "type": "sample",
    }


def test_the_json_of_a_sample_leaves_out_what_was_not_asked_for() -> None:
    assert set(sample_response_json(sampled())) == {"sequences", "type"}
