"""Every kind's result: one stored form, the first form still read, the same answers from both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from futures.payload import decode, encode
from tests.first_results import FIRST_RESULTS, PASS, SAMPLE, SCORED_SAMPLE
from tinkerapi.api.quickref.render_results import result_body
from tinkerapi.api.renderers import to_json
from training.kinds import (
    RESULTS,
    ForwardBackwardResult,
    Kind,
    SampleResult,
    result_value,
    stored_result,
)
from training.kinds.sample_result import SequenceResult

cases = pytest.mark.parametrize(
    ("kind", "first"), FIRST_RESULTS, ids=[kind for kind, _ in FIRST_RESULTS]
)


def test_every_kind_has_a_result_and_a_row_of_the_first_form_here() -> None:
    assert set(RESULTS) == set(Kind) == {kind for kind, _ in FIRST_RESULTS}


@cases
def test_a_row_of_an_earlier_version_is_answered_byte_by_byte_as_before(
    kind: str, first: dict[str, Any]
) -> None:
    stored = encode(first)
    assert to_json(result_body(stored_result(kind, stored))) == to_json(decode(stored))


@cases
def test_the_present_form_gives_the_same_answer(kind: str, first: dict[str, Any]) -> None:
    result = stored_result(kind, encode(first))
    assert type(result) is RESULTS[kind]
    again = stored_result(kind, result.encoded())
    assert type(again) is RESULTS[kind]
    assert to_json(result_body(again)) == to_json(decode(encode(first)))
    assert result.encoded() == again.encoded()


@cases
def test_equal_results_of_two_versions_are_equal(kind: str, first: dict[str, Any]) -> None:
    present = stored_result(kind, encode(first)).encoded()
    assert encode(result_value(kind, encode(first))) == encode(result_value(kind, present))
    assert decode(present)["form"] == 2


def test_results_that_differ_in_one_number_are_not_equal() -> None:
    other = {**PASS, "loss": 0.626}
    values = [encode(result_value("forward", encode(first))) for first in (PASS, other)]
    assert values[0] != values[1]


def test_a_result_of_a_later_form_is_refused() -> None:
    with pytest.raises(ValueError, match="a sample result of form 3; this version reads 2"):
        stored_result("sample", encode({"form": 3}))


def test_a_sample_of_many_sequences_is_stored_smaller_than_before() -> None:
    sequences = [
        {**SAMPLE["sequences"][0], "tokens": np.arange(9, dtype=np.int32), "text": f"text {n}"}  # type: ignore[index]
        for n in range(64)
    ]
    first = encode(
        {**SAMPLE, "sequences": sequences, "completions": [s["text"] for s in sequences]}
    )
    assert len(stored_result("sample", first).encoded()) < len(first)


FLOATS = st.floats(width=32)


@settings(max_examples=50)
@given(data=st.data(), shapes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=6))
def test_log_probabilities_of_any_shape_come_back(
    data: st.DataObject, shapes: list[tuple[int, int]]
) -> None:
    arrays = [
        data.draw(hnp.arrays(np.float32, (n, k) if k else (n,), elements=FLOATS)) for n, k in shapes
    ]
    result = ForwardBackwardResult(
        model_id="m",
        backend="b",
        loss=1.0,
        num_tokens=1,
        num_weighted_tokens=1,
        metrics={},
        logprobs=arrays,
    )
    again = stored_result("forward", result.encoded())
    assert isinstance(again, ForwardBackwardResult)
    assert [array.shape for array in again.logprobs] == [array.shape for array in arrays]
    for ours, sent in zip(again.logprobs, arrays, strict=True):
        np.testing.assert_array_equal(ours, sent)
        assert ours.dtype == np.float32


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    prompts=st.lists(st.none() | st.integers(1, 5), min_size=1, max_size=3),
)
def test_sequences_and_prompts_of_any_length_come_back(
    lengths: list[int], prompts: list[int | None]
) -> None:
    draw = np.random.default_rng(0)
    result = SampleResult(
        model_id=None,
        sequences=[
            SequenceResult(
                stop_reason="stop",
                text=str(number),
                tokens=draw.integers(0, 99, length).astype(np.int32),
                logprobs=draw.random(length, np.float32),
            )
            for number, length in enumerate(lengths)
        ],
        prompt_logprobs=[None if n is None else draw.random(n, np.float32) for n in prompts],
        cached_prompt_tokens=lengths[0],
    )
    again = stored_result("sample", result.encoded())
    assert isinstance(again, SampleResult)
    assert again.cached_prompt_tokens == lengths[0]
    for ours, sent in zip(again.sequences, result.sequences, strict=True):
        assert ours.text == sent.text
        np.testing.assert_array_equal(ours.tokens, sent.tokens)
        np.testing.assert_array_equal(ours.logprobs, sent.logprobs)
    for scored, wanted in zip(again.prompt_logprobs, result.prompt_logprobs, strict=True):
        assert (scored is None) == (wanted is None)
        if scored is not None:
            np.testing.assert_array_equal(scored, wanted)


def test_every_part_of_a_scored_sample_is_stored() -> None:
    again = stored_result("sample", stored_result("sample", encode(SCORED_SAMPLE)).encoded())
    assert isinstance(again, SampleResult)
    for name in again.__dataclass_fields__:
        assert getattr(again, name) is not None, name
    for part in (again.sequences[0], again.echo[0]):
        assert part.written is not None
        assert all(getattr(part.written, name) for name in part.written.__dataclass_fields__)
