"""The SDK decodes our results to the same numbers, in protobuf and in its old JSON."""

from __future__ import annotations

import json
from typing import Any, cast

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

from tinkerapi.api.sdk.render.json_results import forward_backward_output_json, sample_response_json
from tinkerapi.api.sdk.render.protobuf import encode_forward_backward_output, encode_sample_response
from training.errors import InvalidRequest
from training.kinds import ForwardBackwardResult, SampleResult, stored_result
from training.kinds.sample_result import SequenceResult
from training.types import TopLogprobs

LOGPROBS = st.floats(width=32, allow_infinity=False)
NAN = float("nan")


def passed(logprobs: list[Any], **metrics: float) -> ForwardBackwardResult:
    """A forward_backward's result as it comes back from its future."""
    result = ForwardBackwardResult(
        model_id="m",
        backend="fake",
        loss=0.5,
        num_tokens=9,
        num_weighted_tokens=9,
        metrics=metrics or {"loss:sum": 2.5, "perplexity": 1.6},
        logprobs=logprobs,
    )
    return cast(ForwardBackwardResult, stored_result("forward_backward", result.encoded()))


def sequence(**more: Any) -> SequenceResult:
    fields = {
        "stop_reason": "length",
        "text": "hi",
        "tokens": np.array([5, 6], np.int32),
        "logprobs": np.array([-0.5, -0.25], np.float32),
    }
    return SequenceResult(**{**fields, **more})


def sampled(**more: Any) -> SampleResult:
    fields = {"model_id": None, "sequences": [sequence()], "prompt_logprobs": [None]}
    result = SampleResult(**{**fields, **more})
    return cast(SampleResult, stored_result("sample", result.encoded()))


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


def test_the_sdk_can_combine_what_several_chunks_answer() -> None:
    first = passed([np.ones(2, np.float32)], **{"loss:sum": 1.0, "x:mean": 1.0, "perplexity": 2})
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
        encode_sample_response(sampled(prompt_logprobs=[prompt_logprobs]))
    )

    (only,) = got.sequences
    assert (only.stop_reason, only.tokens) == ("length", [5, 6])
    assert only.logprobs == [-0.5, -0.25]
    assert only.topk_logprobs is None
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
        sequence(
            stop_reason=stop_reason,
            tokens=np.array([token for token, _ in pairs], np.int32),
            logprobs=np.array([logprob for _, logprob in pairs], np.float32),
        )
        for stop_reason, pairs in sequences
    ]

    got = deserialize_sample_response(encode_sample_response(sampled(sequences=sent)))

    for one, (stop_reason, pairs) in zip(got.sequences, sequences, strict=True):
        assert one.stop_reason == stop_reason
        assert one.tokens == [token for token, _ in pairs]
        np.testing.assert_array_equal(one.logprobs_np, np.float32([lp for _, lp in pairs]))


def test_a_sequence_may_be_empty() -> None:
    empty = sequence(tokens=np.array([], np.int32), logprobs=np.array([], np.float32))

    got = deserialize_sample_response(
        encode_sample_response(sampled(sequences=[empty, sequence()]))
    )

    assert [one.tokens for one in got.sequences] == [[], [5, 6]]
    assert [one.logprobs for one in got.sequences] == [None, [-0.5, -0.25]]


def test_the_cached_tokens_of_a_prompt_arrive_in_both_forms() -> None:
    cached = sampled(cached_prompt_tokens=64)
    assert deserialize_sample_response(encode_sample_response(cached)).prompt_cache_hit_tokens == 64
    assert sample_response_json(cached)["prompt_cache_hit_tokens"] == 64


TOPK = TopLogprobs(
    token_ids=np.array([[0, 0], [7, 8], [9, 0]], np.int32),
    logprobs=np.array([[-99999, -99999], [-0.5, -1.5], [-0.25, -99999]], np.float32),
)


def test_top_k_rows_without_data_are_none_and_short_rows_are_short() -> None:
    top = TopLogprobs(token_ids=TOPK.token_ids[1:], logprobs=TOPK.logprobs[1:])
    result = sampled(sequences=[sequence(top=top)], top_prompt_logprobs=TOPK)

    got = deserialize_sample_response(encode_sample_response(result))

    assert got.topk_prompt_logprobs == [None, [(7, -0.5), (8, -1.5)], [(9, -0.25)]]
    assert got.sequences[0].topk_logprobs == [[(7, -0.5), (8, -1.5)], [(9, -0.25)]]


def test_what_else_can_be_asked_of_a_prompt_arrives() -> None:
    target = np.array([[-0.5, 0.0], [-1.0, -2.0]], np.float32)
    tokens, logprobs = np.array([[3], [4]]), np.array([[-0.5], [-0.75]], np.float32)

    got = deserialize_sample_response(
        encode_sample_response(
            sampled(target_prompt_logprobs=target, prompt_alternatives=(tokens, logprobs))
        )
    )

    assert got.target_prompt_logprobs is not None
    assert got.prompt_alt_tokens is not None
    np.testing.assert_array_equal(got.target_prompt_logprobs.to_numpy(), target)
    assert got.prompt_alt_tokens.tokens.dtype == "int64"
    np.testing.assert_array_equal(got.prompt_alt_tokens.tokens.to_numpy(), tokens)
    np.testing.assert_array_equal(got.prompt_alt_tokens.logprobs.to_numpy(), logprobs)
    assert got.prompt_cache_hit_tokens == 0


def test_two_prompts_that_were_not_scored_have_no_log_probabilities() -> None:
    result = sampled(prompt_logprobs=[None, None])

    assert deserialize_sample_response(encode_sample_response(result)).prompt_logprobs is None
    assert "prompt_logprobs" not in sample_response_json(result)


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
        prompt_logprobs=[np.array([np.nan, -1.5, -0.125], np.float32)], top_prompt_logprobs=TOPK
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
