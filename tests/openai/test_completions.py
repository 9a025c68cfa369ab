"""Completions and chat completions through the official client."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai.types import completion_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_create_params

from futures.models import Future
from futures.payload import decode
from tests.conftest import ApiClient
from tests.openai.conftest import OpenAIUser
from tinkerapi.api.openai.messages import MESSAGE_FIELDS, NOT_TAKEN
from tinkerapi.api.openai.tables import CHAT_FIELDS, COMPLETION_FIELDS
from training.base_models import base_model_get
from training.payloads import sampling_params_from_payload

MODEL = base_model_get(None).name
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}

VLLM = {
    "add_generation_prompt", "add_special_tokens", "allowed_token_ids", "bad_words",
    "chat_template", "chat_template_kwargs", "continue_final_message", "documents",
    "early_stopping", "echo", "guided_choice", "guided_grammar", "guided_json", "guided_regex",
    "ignore_eos", "include_reasoning", "include_stop_str_in_output", "length_penalty", "min_p",
    "min_tokens", "priority", "prompt_logprobs", "repetition_penalty", "response_format",
    "return_token_ids", "return_tokens_as_token_ids", "skip_special_tokens",
    "spaces_between_special_tokens", "stop_token_ids", "structured_outputs", "top_k",
    "truncate_prompt_tokens", "use_beam_search",
}  # fmt: skip


def complete(user: OpenAIUser, /, **more: Any) -> Any:
    fields = {"model": MODEL, "prompt": "hello", "seed": 7, **more}
    return user(lambda client: client.completions.create(**fields))


def chat(user: OpenAIUser, /, **more: Any) -> Any:
    fields = {"model": MODEL, "messages": HELLO, "seed": 7, **more}
    return user(lambda client: client.chat.completions.create(**fields))


def sampled(api: ApiClient, **more: Any) -> Any:
    """The quick reference's answer to the same question."""
    params = {"seed": 7, **more.pop("sampling_params", {})}
    answer = api.post("/api/v1/sample", base_model=MODEL, sampling_params=params, **more)
    assert answer.status_code == 200, answer.content
    return answer.json()


def test_a_completion_is_what_sampling_says(user, served_api):
    completion = complete(user, n=2, max_tokens=9)
    sample = sampled(served_api, prompt="hello", num_samples=2, sampling_params={"max_tokens": 9})

    assert completion.id.startswith("future_")
    assert (completion.object, completion.model) == ("text_completion", MODEL)
    assert [choice.text for choice in completion.choices] == sample["completions"]
    assert [choice.index for choice in completion.choices] == [0, 1]
    reasons = [sequence["stop_reason"] for sequence in sample["sequences"]]
    assert [choice.finish_reason for choice in completion.choices] == reasons
    num_tokens = sum(len(sequence["tokens"]) for sequence in sample["sequences"])
    assert completion.usage.prompt_tokens == len("hello")
    assert completion.usage.completion_tokens == num_tokens
    assert completion.usage.total_tokens == len("hello") + num_tokens


def test_usage_says_how_much_of_the_prompt_was_cached(user):
    first, again = (complete(user, prompt="a prompt of its own", n=2) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens == len("a prompt of its own") - 1
    assert again.usage.prompt_tokens == first.usage.prompt_tokens


def test_several_prompts_of_either_kind_make_their_choices_in_order(user):
    both = complete(user, prompt=["hello", "yes"], n=2)
    tokens = complete(user, prompt=[list(b"hello"), list(b"yes")], n=2)
    alone = complete(user, prompt=list(b"yes"), n=2)

    texts = [choice.text for choice in both.choices]
    assert [choice.text for choice in tokens.choices] == texts
    assert [choice.text for choice in alone.choices] == texts[2:]
    assert both.usage.prompt_tokens == len("helloyes")
    assert max(len(text) for text in texts) <= 16  # a completion's own default


@pytest.mark.parametrize("long", ["x" * 600, [1] * 600])
def test_a_prompt_that_cannot_be_sampled_is_named_among_several(user, long):
    fine = "hello" if isinstance(long, str) else [1]
    for prompts, name in (([fine, long], "prompt[1]"), ([long], "prompt")):
        with pytest.raises(openai.BadRequestError) as refused:
            complete(user, prompt=prompts)
        assert refused.value.body["message"].startswith(f"{name}: ")


def test_a_chat_completion_is_what_sampling_says(user, served_api):
    completion = chat(user, max_completion_tokens=12, temperature=0.5, top_p=0.9)
    sample = sampled(
        served_api,
        messages=HELLO,
        sampling_params={"max_tokens": 12, "temperature": 0.5, "top_p": 0.9},
    )

    [choice] = completion.choices
    assert completion.object == "chat.completion"
    assert (choice.message.role, choice.message.content) == ("assistant", sample["generated_text"])
    assert choice.finish_reason == sample["sequences"][0]["stop_reason"]
    assert completion.usage.completion_tokens == len(sample["sequences"][0]["tokens"])


def test_text_parts_and_a_message_of_the_client_are_messages(user):
    said = chat(user).choices[0].message
    longer = [*HELLO, said.model_dump(), {"role": "user", "content": "more"}]
    parts = [
        *HELLO,
        {"role": "assistant", "content": said.content},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("mo", "re")]},
    ]

    assert chat(user, messages=longer).choices == chat(user, messages=parts).choices


def test_a_stop_string_ends_a_choice_and_is_not_in_it(user):
    whole = complete(user, max_tokens=30).choices[0].text
    stop = whole[3:5]

    for value in (stop, [stop, "\n\n"]):
        [choice] = complete(user, max_tokens=30, stop=value).choices
        assert choice.text == whole.partition(stop)[0]
        assert choice.finish_reason == "stop"
    assert complete(user, max_tokens=30, stop=[]).choices[0].text == whole


def test_log_probabilities_are_those_of_the_sampled_tokens(user, served_api):
    sample = sampled(served_api, messages=HELLO, sampling_params={"max_tokens": 40})
    content = chat(user, max_tokens=40, logprobs=True).choices[0].logprobs.content
    prompt = [*b"user: hello", 256, *b"assistant: "]
    logprobs = complete(user, prompt=prompt, max_tokens=40, logprobs=0).choices[0].logprobs

    [sequence] = sample["sequences"]
    values = sequence["logprobs"]
    assert [item.logprob for item in content] == pytest.approx(values)
    assert logprobs.token_logprobs == pytest.approx(values)
    texts = ["<end>" if token == 256 else chr(token) for token in sequence["tokens"]]
    assert [item.token for item in content] == logprobs.tokens == texts
    assert [bytes(item.bytes).decode() for item in content] == texts
    assert [sample["generated_text"][offset : offset + 1] for offset in logprobs.text_offset] == [
        "" if text == "<end>" else text for text in texts
    ]
    assert complete(user).choices[0].logprobs is None


def test_the_likeliest_tokens_come_with_log_probabilities_if_asked_for(user):
    content = chat(user, max_tokens=5, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    logprobs = complete(user, max_tokens=5, logprobs=2).choices[0].logprobs

    # To the fake engine every token is as likely as any other, and it names the first.
    for item in content:
        assert [top.token for top in item.top_logprobs] == ["\x00", "\x01", "\x02"]
        assert [top.logprob for top in item.top_logprobs] == [item.logprob] * 3
    assert len(logprobs.top_logprobs) == len(logprobs.tokens) == 5
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert set(top) == {"\x00", "\x01", token}  # the sampled one always
        assert top[token] == value


REFUSED: list[Any] = [
    (chat, {"tool_choice": "required"}, "tool_choice"),
    (chat, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    (chat, {"parallel_tool_calls": False, "tools": [TOOL]}, "parallel_tool_calls"),
    (chat, {"tools": [{"type": "web_search"}]}, "tools[0].function"),
    (chat, {"response_format": {"type": "json_object"}}, "response_format"),
    (chat, {"top_logprobs": 3}, "top_logprobs"),
    (chat, {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    (chat, {"presence_penalty": 2.5}, "presence_penalty"),
    (chat, {"reasoning_effort": "high"}, "reasoning_effort"),
    (chat, {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    (chat, {"max_tokens": 0}, "max_tokens"),
    (chat, {"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
    (chat, {"messages": []}, "messages"),
    (chat, {"stream_options": {"include_usage": True}}, "stream_options"),
    (chat, {"extra_body": {"top_p_k": 3}}, "top_p_k"),
    (chat, {"extra_body": {"top_k": -2}}, "top_k"),
    (chat, {"extra_body": {"min_p": 1.5}}, "min_p"),
    (chat, {"extra_body": {"stop_token_ids": ["a"]}}, "stop_token_ids[0]"),
    (chat, {"extra_body": {"min_tokens": 3}}, "min_tokens"),
    (chat, {"extra_body": {"guided_json": {}}}, "guided_json"),
    (chat, {"extra_body": {"skip_special_tokens": False}}, "skip_special_tokens"),
    (chat, {"extra_body": {"prompt_logprobs": 0}}, "prompt_logprobs"),
    (complete, {"best_of": 3}, "best_of"),
    (complete, {"echo": 1}, "echo"),
    (complete, {"suffix": "."}, "suffix"),
    (complete, {"logit_bias": {"seven": 1}}, "logit_bias.seven"),
    (complete, {"logit_bias": {"7": 101}}, "logit_bias.7"),
    (complete, {"logit_bias": {"7": 1, "07": 2}}, "logit_bias.07"),
    (complete, {"temperature": -1}, "temperature"),
    (complete, {"n": 0}, "n"),
    (complete, {"logprobs": 21}, "logprobs"),
    (complete, {"prompt": []}, "prompt"),
    (complete, {"prompt": ["fine", 7]}, "prompt[1]"),
    (complete, {"prompt": [999]}, "prompt"),  # found by the worker: not in its vocabulary
]


def test_what_is_not_honoured_is_refused_by_name(user):
    for create, fields, param in REFUSED:
        with pytest.raises(openai.BadRequestError) as refused:
            create(user, **fields)

        assert refused.value.param == param
        assert refused.value.type == "invalid_request_error"
        assert param in refused.value.message
        assert len(refused.value.message) < 2000


def test_what_asks_for_nothing_is_accepted(user):
    off = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": False,
        "store": False,
        "user": "someone",
        "reasoning_effort": "none",
        "logit_bias": {},
    }
    vllm = {
        "min_p": 0,
        "top_k": 0,
        "repetition_penalty": 1,
        "stop_token_ids": [],
        "min_tokens": 0,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": False,
        "include_stop_str_in_output": False,
        "prompt_logprobs": None,
        "add_special_tokens": False,
        "add_generation_prompt": True,
        "chat_template_kwargs": {},
    }

    assert chat(user, extra_body=vllm, **off).choices == chat(user).choices
    assert complete(user, n=2, best_of=2, echo=False).choices == complete(user, n=2).choices


def test_stop_tokens_end_a_choice_and_end_tokens_may_be_ignored(user, served_api):
    free = sampled(served_api, prompt="hello", sampling_params={"max_tokens": 60, "stop": []})
    tokens = free["sequences"][0]["tokens"]
    [ignoring] = complete(user, max_tokens=60, extra_body={"ignore_eos": True}).choices
    assert (ignoring.text, ignoring.finish_reason) == (free["generated_text"], "length")

    stop = next(token for token in tokens[5:] if token != 256)
    fields = {"ignore_eos": True, "stop_token_ids": [stop]}
    [stopped] = complete(user, max_tokens=60, extra_body=fields, logprobs=0).choices
    kept = tokens[: tokens.index(stop)]
    assert stopped.text == bytes(token for token in kept if token != 256).decode()
    assert stopped.finish_reason == "stop"
    assert stopped.logprobs.tokens[-1] == chr(stop)
    assert stopped.logprobs.text_offset[-1] == len(stopped.text)


def test_what_decides_a_token_reaches_the_sampler(user):
    """Its effect is tested in the engine's tests."""
    penalties = {
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "logit_bias": {"7": 1.5, "3": -2},
    }
    fields = {"top_k": 3, "min_p": 0.25, "repetition_penalty": 1.5}
    chat(user, extra_body=fields, **penalties)

    params = sampling_params_from_payload(
        decode(bytes(Future.objects.get().payload))["sampling_params"]
    )
    assert (params.top_k, params.min_p, params.repetition_penalty) == (3, 0.25, 1.5)
    assert (params.presence_penalty, params.frequency_penalty) == (0.5, -1)
    assert params.logit_bias == ((3, -2.0), (7, 1.5))


@pytest.mark.parametrize(
    ("params", "fields"),
    [
        (completion_create_params, COMPLETION_FIELDS),
        (chat_create_params, CHAT_FIELDS),
    ],
)
def test_every_field_of_the_official_client_is_in_the_tables(params, fields):
    known = set(params.CompletionCreateParamsBase.__annotations__)
    known |= set(params.CompletionCreateParamsStreaming.__annotations__)

    assert known <= set(fields)
    assert set(fields) - known <= VLLM


@pytest.mark.parametrize(
    ("role", "declared"),
    [
        ("system", ChatCompletionSystemMessageParam),
        ("developer", ChatCompletionDeveloperMessageParam),
        ("user", ChatCompletionUserMessageParam),
        ("assistant", ChatCompletionAssistantMessageParam),
        ("tool", ChatCompletionToolMessageParam),
    ],
)
def test_every_field_of_the_official_clients_messages_is_taken_or_refused_by_name(role, declared):
    assert set(declared.__annotations__) - {"role"} <= MESSAGE_FIELDS[role] | set(NOT_TAKEN)
