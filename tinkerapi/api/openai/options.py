"""Turns a checked body of either request into options for sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.conf import settings

from tinkerapi.api.fields.prompts import check_text_length
from training.errors import InvalidRequest, LimitExceeded
from training.types import ChatOptions, Conversation, Prompt, SamplingParams

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for a completion without ``max_tokens``; a chat has no such default,
so the server's applies."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """A checked request of either kind."""

    model: str
    prompts: list[Prompt]
    num_samples: int
    """For each prompt."""
    sampling_params: SamplingParams
    logprobs: bool
    top_logprobs: int
    """Number of likeliest tokens at each position."""
    echo: bool
    """Whether a choice begins with its prompt."""
    stream: bool
    include_usage: bool
    """Whether a stream ends with the number of tokens."""


def completion_options(body: Mapping[str, Any]) -> Options:
    """A checked completion body.

    Raises:
        InvalidRequest: (400)
    """
    if body["best_of"] not in (None, body["n"]):
        raise InvalidRequest("best_of: this server makes exactly n choices; leave it out")
    if body["echo"] and body["stream"]:
        raise InvalidRequest("echo: not with stream; ask for the whole answer")
    return _options(
        body,
        prompts=body["prompt"],
        max_tokens=COMPLETION_MAX_TOKENS if body["max_tokens"] is None else body["max_tokens"],
        logprobs=body["logprobs"] is not None,
        top_logprobs=body["logprobs"] or 0,
        echo=body["echo"],
    )


def chat_options(body: Mapping[str, Any]) -> Options:
    """A checked chat body.

    Raises:
        InvalidRequest: (400)
    """
    if body["top_logprobs"] and not body["logprobs"]:
        raise InvalidRequest("top_logprobs: only with logprobs")
    given = {body["max_tokens"], body["max_completion_tokens"]} - {None}
    if len(given) > 1:
        raise InvalidRequest("max_tokens: differs from max_completion_tokens; give one of them")
    return _options(
        body,
        prompts=[Conversation(body["messages"], _template_options(body))],
        max_tokens=given.pop() if given else None,
        logprobs=body["logprobs"],
        top_logprobs=body["top_logprobs"] or 0,
        echo=False,
    )


def _template_options(body: Mapping[str, Any]) -> ChatOptions:
    if body["continue_final_message"] and body["add_generation_prompt"]:
        raise InvalidRequest(
            "continue_final_message: the last message cannot continue after a new one has begun; "
            "send add_generation_prompt false with it"
        )
    tools = body["tools"]
    if tools and not body["parallel_tool_calls"]:
        raise InvalidRequest(
            "parallel_tool_calls: this server cannot prevent a model from calling several tools; "
            "leave it out"
        )
    check_text_length(tools, "tools")
    check_text_length(body["chat_template_kwargs"], "chat_template_kwargs")
    return ChatOptions(
        tools=tools if tools and body["tool_choice"] != "none" else None,
        add_generation_prompt=body["add_generation_prompt"],
        continue_final_message=body["continue_final_message"],
        template_kwargs=body["chat_template_kwargs"],
    )


def _options(
    body: Mapping[str, Any],
    *,
    prompts: list[Prompt],
    max_tokens: int | None,
    logprobs: bool,
    top_logprobs: int,
    echo: bool,
) -> Options:
    if body["stream_options"] is not None and not body["stream"]:
        raise InvalidRequest("stream_options: only with stream")
    total = len(prompts) * body["n"]
    if total > settings.MAX_SAMPLES:
        raise LimitExceeded(
            f"n: {total} choices in all; this server makes up to {settings.MAX_SAMPLES} in one "
            "request"
        )
    return Options(
        model=body["model"],
        prompts=prompts,
        num_samples=body["n"],
        sampling_params=SamplingParams(
            max_tokens=max_tokens,
            seed=body["seed"],
            stop=body["stop"],
            temperature=body["temperature"],
            top_k=body["top_k"],
            top_p=body["top_p"],
            min_p=body["min_p"],
            stop_token_ids=body["stop_token_ids"],
            ignore_eos=body["ignore_eos"],
            presence_penalty=body["presence_penalty"],
            frequency_penalty=body["frequency_penalty"],
            repetition_penalty=body["repetition_penalty"],
            logit_bias=body["logit_bias"],
        ),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        echo=echo,
        stream=body["stream"],
        include_usage=bool(body["stream_options"] and body["stream_options"]["include_usage"]),
    )
