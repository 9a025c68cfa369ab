"""All parts of a conversation reach the model's template unchanged."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from futures.models import Future
from futures.payload import decode
from tests.openai.test_completions import HELLO, TOOL, chat, complete
from training.payloads import prompt_from_payload
from training.types import ChatOptions, Conversation, Message

CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "f", "arguments": '{"city": "Bern", "days": [1, 2.5, null]}'},
}
RICH: list[Any] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "name": "ada", "content": [{"type": "text", "text": "How is it?"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    {"role": "assistant", "content": "", "reasoning_content": "It rains."},
]


def asked() -> Conversation:
    """The newest request's stored conversation."""
    stored = decode(bytes(Future.objects.latest("created_at").payload))["prompts"][0]
    prompt = prompt_from_payload(stored)
    assert isinstance(prompt, Conversation)
    return prompt


def test_tools_calls_names_and_thoughts_reach_the_template(user):
    kwargs = {"enable_thinking": False}
    chat(user, messages=RICH, tools=[TOOL], extra_body={"chat_template_kwargs": kwargs})

    arguments = {"city": "Bern", "days": [1, 2.5, None]}
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    assert asked() == Conversation(
        (
            Message("developer", "Be brief."),
            Message("user", "How is it?", name="ada"),
            Message("assistant", None, tool_calls=(call,)),
            Message("tool", "rain", tool_call_id="call_1"),
            Message("assistant", "", reasoning_content="It rains."),
        ),
        ChatOptions(tools=(TOOL,), template_kwargs=kwargs),
    )


def test_tools_that_are_not_to_be_called_are_not_told_of(user):
    chat(user, tools=[TOOL], tool_choice="none")
    assert asked().options == ChatOptions()
    chat(user, tools=[TOOL], tool_choice="auto", parallel_tool_calls=True)
    assert asked().options == ChatOptions(tools=(TOOL,))


def test_an_assistant_that_has_begun_goes_on(user):
    begun = [*HELLO, {"role": "assistant", "content": "Well"}]
    prefill = {"add_generation_prompt": False, "continue_final_message": True}
    answer = chat(user, messages=begun, max_tokens=9, extra_body=prefill)

    prompt = [*b"user: hello", 256, *b"assistant: Well"]
    same = complete(user, prompt=prompt, max_tokens=9)
    assert answer.choices[0].message.content == same.choices[0].text
    assert answer.usage.prompt_tokens == same.usage.prompt_tokens
    assert answer.usage.completion_tokens == same.usage.completion_tokens
    # Without the two, the assistant has spoken and begins another message, as at OpenAI's.
    assert chat(user, messages=begun, max_tokens=9).usage.prompt_tokens > len(prompt)


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "refusal": "no"}]}, "messages[0].refusal"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": []}]}, "messages[0].tool"),
        ({"messages": [{"role": "user", "content": "a", "name": ""}]}, "messages[0].name"),
        ({"messages": [{"role": "assistant", "tool_calls": 7}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0]"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                    }
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
        ({"messages": [{"role": "function", "name": "f", "content": ""}]}, "messages[0].role"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "f", "extra": 1}}]}, "tools[0].f"),
        ({"extra_body": {"chat_template_kwargs": [1]}}, "chat_template_kwargs"),
        ({"extra_body": {"continue_final_message": True}}, "continue_final_message"),
    ],
)
def test_what_no_template_takes_is_refused_by_name(user, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(user, **fields)
    assert refused.value.param.startswith(param)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(40)}}]},
        {"extra_body": {"chat_template_kwargs": nested(40)}},
    ],
)
def test_what_nests_too_deep_is_refused_before_anybody_looks_for_its_name(user, fields):
    with pytest.raises(openai.BadRequestError, match="nests lists and objects more than 32 deep"):
        chat(user, **fields)


def test_the_arguments_of_all_calls_together_hold_no_more_than_one_body_may(user, monkeypatch):
    monkeypatch.setattr("tinkerapi.api.bodies.json_limits.MAX_CONTAINERS", 200)
    monkeypatch.setattr("tinkerapi.api.bodies.json_limits.MAX_DEPTH", 8)

    def ask(num_lists: int) -> None:
        arguments = '{"a": [' + ",".join(["[]"] * num_lists) + "]}"
        calls = [{"function": {"name": "f", "arguments": arguments}}] * 3
        chat(user, messages=[*HELLO, {"role": "assistant", "tool_calls": calls}], max_tokens=1)

    ask(40)
    with pytest.raises(openai.BadRequestError, match="more than 200 lists and objects"):
        ask(80)
