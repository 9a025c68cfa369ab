"""A future stores the complete request, and equal requests have equal payloads in all versions."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from futures.payload import decode, digest, encode
from training.kinds import ForwardBackward
from training.payloads import (
    prompt_from_payload,
    prompt_to_payload,
    sampling_params_from_payload,
    sampling_params_to_payload,
)
from training.types import ChatOptions, Conversation, Message, SamplingParams

CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 1, "b": [2, None, {"c": "d"}]}},
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}

PLAIN = Conversation((Message("user", "hi"), Message("assistant", "yes")))
RICH = Conversation(
    (
        Message("developer", "Be brief."),
        Message("user", "1 + 1?", name="ada"),
        Message("assistant", None, tool_calls=(CALL,), reasoning_content="Add."),
        Message("tool", "2", tool_call_id="call_1", name="add"),
        Message("assistant", "", reasoning_content=""),
    ),
    ChatOptions(
        tools=(TOOL,),
        add_generation_prompt=False,
        continue_final_message=True,
        template_kwargs={"enable_thinking": False},
    ),
)


def training_on(conversation: Conversation) -> ForwardBackward:
    return ForwardBackward(data=[conversation], loss_fn="cross_entropy", loss_fn_config={})


def stored(value: Any) -> Any:
    return decode(encode(value))


def test_a_plain_conversation_is_stored_as_in_every_version_before() -> None:
    """Its digest tells a repeated request, also one that an older version took."""
    shape = {"messages": [["user", "hi"], ["assistant", "yes"]]}
    assert prompt_to_payload(PLAIN) == shape
    assert training_on(PLAIN).to_payload()["data"] == [shape]
    assert digest("sample", prompt_to_payload(PLAIN)) == digest("sample", shape)


@pytest.mark.parametrize("conversation", [PLAIN, RICH], ids=["plain", "rich"])
def test_a_conversation_comes_back_as_it_was(conversation: Conversation) -> None:
    assert prompt_from_payload(stored(prompt_to_payload(conversation))) == conversation
    payload = stored(training_on(conversation).to_payload())
    assert ForwardBackward.from_payload(payload).data == [conversation]


def test_a_template_is_told_what_is_set_and_nothing_else() -> None:
    assert PLAIN.to_dicts()[0] == {"role": "user", "content": "hi"}
    assert RICH.to_dicts()[2] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [CALL],
        "reasoning_content": "Add.",
    }
    assert RICH.to_dicts()[4]["reasoning_content"] == ""


def test_what_a_template_writes_beside_the_contents_counts_as_work() -> None:
    long = "x" * 3_000
    described = ({"type": "function", "function": {"name": "f", "description": long}},)
    for conversation in (
        Conversation((Message("assistant", "", reasoning_content=long),)),
        Conversation((Message("assistant", None, tool_calls=({"function": {"name": long}},)),)),
        Conversation((Message("user", ""),), ChatOptions(tools=described)),
    ):
        assert training_on(conversation).cost > 1_000


tokens = st.integers(0, 2**31 - 1)

PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(0, 9),
    seed=st.none() | st.integers(),
    stop=st.none() | st.tuples() | st.tuples(st.text()) | st.tuples(tokens, tokens),
    temperature=st.floats(0, 2),
    min_p=st.floats(0, 1),
    stop_token_ids=st.lists(tokens, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.01, 100),
    logit_bias=st.lists(st.tuples(tokens, st.floats(-100, 100)), max_size=3).map(tuple),
)


@given(PARAMS.filter(lambda params: params.seed is None or abs(params.seed) < 2**63))
def test_sampling_params_come_back_as_they_were(params: SamplingParams) -> None:
    stored = decode(encode(sampling_params_to_payload(params)))
    assert sampling_params_from_payload(stored) == params


def test_options_that_came_later_do_not_change_what_older_requests_store() -> None:
    """A repeat after an upgrade is recognized by its digest; the earlier row has these six."""
    before = '{"max_tokens": 5, "seed": 1, "stop": ["x"], "temperature": 1.0, "top_k": -1, '
    before += '"top_p": 0.9}'
    params = SamplingParams(max_tokens=5, seed=1, stop=("x",), top_p=0.9)
    assert encode(sampling_params_to_payload(params)) == encode(json.loads(before))
    assert sampling_params_from_payload(json.loads(before)) == params
