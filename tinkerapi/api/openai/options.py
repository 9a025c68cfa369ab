"""OpenAI's request fields: honoured, without effect, or refused by name unless they are off.

Every field of OpenAI's two requests is in these tables, and a test compares them with the official
client's own types. What is not declared at all is refused as an unknown field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.conf import settings

from tinkerapi.api.data import check_conversation, check_prompt
from tinkerapi.api.fields import (
    Custom,
    Field,
    Flag,
    Integer,
    Number,
    Text,
    check_object,
    refuse,
    refuse_size,
)
from tinkerapi.api.views.sampling import MAX_STOP_CHARACTERS, MAX_STOPS, check_num_samples
from training.errors import InvalidRequest, LimitExceeded
from training.types import Conversation, Prompt, SamplingParams

COMPLETION_MAX_TOKENS = 16
"""What OpenAI documents for a completion that names no ``max_tokens``; a chat has no such limit,
so there the server's default counts."""

SMALLEST_SEED = -(2**63)

MAX_USER_CHARACTERS = 1000

MAX_TOP_LOGPROBS = 20


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
    """So many of the likeliest tokens at each position."""
    stream: bool
    include_usage: bool
    """Whether a stream ends with the number of tokens."""


def _off(*values: Any) -> Custom:
    """An option that this server does not have: only a value that asks for nothing will do."""

    def check(value: Any, where: str) -> None:
        if not any(value == off and type(value) in (type(off), int) for off in values):
            raise InvalidRequest(f"{where}: this server does not have this option; leave it out")

    return Custom(description="Not available.", checker=check, json={})


def _check_stop(value: Any, where: str) -> tuple[str, ...] | None:
    """Stop strings; none at all, as OpenAI means it, stops at the model's own end tokens."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise refuse(where, f"text, or a list of up to {MAX_STOPS} texts", value)
    if len(stops) > MAX_STOPS:
        raise refuse_size(where, len(stops), "entries", MAX_STOPS)
    for index, stop in enumerate(stops):
        if type(stop) is not str or not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise refuse(
                f"{where}[{index}]", f"text of 1 to {MAX_STOP_CHARACTERS} characters", stop
            )
    return tuple(stops) or None


def _check_stream_options(value: Any, where: str) -> dict[str, Any]:
    fields = {
        "include_usage": Flag(description="End with the token counts.", default=False),
        "include_obfuscation": _off(False),
    }
    return check_object(fields, value, where)


def _check_messages(value: Any, where: str) -> Conversation:
    """A conversation; a content may be a list of text parts, and null fields say nothing."""
    if not isinstance(value, list):
        raise refuse(where, "a list of messages", value)
    return check_conversation(
        [_plain_message(item, f"{where}[{index}]") for index, item in enumerate(value)], where
    )


def _plain_message(value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        return value
    message = {name: item for name, item in value.items() if item is not None}
    parts = message.get("content")
    if isinstance(parts, list):
        for index, part in enumerate(parts):
            if not (
                isinstance(part, dict)
                and set(part) == {"type", "text"}
                and part["type"] == "text"
                and type(part["text"]) is str
            ):
                raise refuse(
                    f"{where}.content[{index}]", 'a part like {"type": "text", "text": "hi"}', part
                )
        message["content"] = "".join(part["text"] for part in parts)
    return message


def _check_prompts(value: Any, where: str) -> list[Prompt]:
    """Text or token ids, or a list of either."""
    if not isinstance(value, str | list):
        raise refuse(where, "text, token ids, or a list of either", value)
    if isinstance(value, str) or not value or type(value[0]) is int:
        return [_check_prompt(value, where)]
    if len(value) > settings.MAX_DATUMS:
        raise LimitExceeded(
            f"{where}: {len(value)} prompts; this server takes {settings.MAX_DATUMS} in one request"
        )
    return [_check_prompt(item, f"{where}[{index}]") for index, item in enumerate(value)]


def _check_prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str) or (isinstance(value, list) and type((value or [0])[0]) is int):
        return check_prompt(value, where)
    raise refuse(where, "text or token ids", value)


def _max_tokens() -> Integer:
    return Integer(
        description="Most tokens of one choice.",
        minimum=1,
        maximum=lambda: settings.MAX_DATUM_TOKENS,
    )


_SHARED: Mapping[str, Field] = {
    "model": Text(
        description="A base model, or a `tinker://` path of sampler weights.",
        required=True,
        max_length=400,
    ),
    "max_tokens": _max_tokens(),
    "n": Custom(description="Choices.", checker=check_num_samples, json={}, default=1),
    "stop": Custom(description="Stop strings.", checker=_check_stop, json={}),
    "seed": Integer(description="Choice i depends on the seed and i only.", minimum=SMALLEST_SEED),
    "temperature": Number(description="0 is greedy.", maximum=100, default=1.0),
    "top_p": Number(description="Nucleus.", above_minimum=True, maximum=1, default=1.0),
    "stream": Flag(description="Server-sent events.", default=False),
    "stream_options": Custom(
        description="Only with stream.", checker=_check_stream_options, json={}
    ),
    "frequency_penalty": _off(0.0),
    "presence_penalty": _off(0.0),
    "logit_bias": _off({}),
    # Without effect: they tell OpenAI whose request it is.
    "user": Text(description="Without effect.", max_length=MAX_USER_CHARACTERS),
}

COMPLETION_FIELDS: Mapping[str, Field] = {
    **_SHARED,
    "prompt": Custom(
        description="What to continue.", required=True, checker=_check_prompts, json={}
    ),
    "logprobs": Integer(
        description="Log-probabilities: the tokens', and so many likeliest ones.",
        maximum=MAX_TOP_LOGPROBS,
    ),
    "echo": _off(False),
    "suffix": _off(),
    "best_of": Integer(description="Must equal n.", minimum=1),
}

CHAT_FIELDS: Mapping[str, Field] = {
    **_SHARED,
    "messages": Custom(
        description="The conversation.", required=True, checker=_check_messages, json={}
    ),
    "max_completion_tokens": _max_tokens(),
    "logprobs": Flag(description="Log-probabilities of the tokens.", default=False),
    "top_logprobs": Integer(description="Likeliest tokens too.", maximum=MAX_TOP_LOGPROBS),
    "response_format": _off({"type": "text"}),
    "modalities": _off(["text"]),
    "service_tier": _off("auto", "default"),
    "store": _off(False),
    "tools": _off([]),
    "tool_choice": _off("none", "auto"),
    "parallel_tool_calls": _off(True, False),
    "functions": _off([]),
    "function_call": _off("none", "auto"),
    "metadata": _off({}),
    **{
        name: _off()
        for name in (
            "audio",
            "moderation",
            "prediction",
            "prompt_cache_options",
            "reasoning_effort",
            "verbosity",
            "web_search_options",
        )
    },
    # Without effect, as ``user``.
    "safety_identifier": Text(description="Without effect.", max_length=MAX_USER_CHARACTERS),
    "prompt_cache_key": Text(description="Without effect.", max_length=MAX_USER_CHARACTERS),
    "prompt_cache_retention": Text(description="Without effect."),
}


def completion_options(body: Mapping[str, Any]) -> Options:
    """A checked completion body.

    Raises:
        InvalidRequest: (400)
    """
    if body["best_of"] not in (None, body["n"]):
        raise InvalidRequest("best_of: this server makes exactly n choices; leave it out")
    return _options(
        body,
        prompts=body["prompt"],
        max_tokens=body["max_tokens"] or COMPLETION_MAX_TOKENS,
        logprobs=body["logprobs"] is not None,
        top_logprobs=body["logprobs"] or 0,
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
        raise InvalidRequest("max_tokens: not what max_completion_tokens says; give one of them")
    return _options(
        body,
        prompts=[body["messages"]],
        max_tokens=given.pop() if given else None,
        logprobs=body["logprobs"],
        top_logprobs=body["top_logprobs"] or 0,
    )


def _options(
    body: Mapping[str, Any],
    *,
    prompts: list[Prompt],
    max_tokens: int | None,
    logprobs: bool,
    top_logprobs: int,
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
            top_p=body["top_p"],
        ),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        stream=body["stream"],
        include_usage=bool(body["stream_options"] and body["stream_options"]["include_usage"]),
    )
