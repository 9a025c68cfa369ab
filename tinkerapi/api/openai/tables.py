"""Every field of OpenAI's two requests: honoured, without effect, or refused by name.

A test compares these tables with the official client's own types, and the manual's page with
both. A field that is not declared is refused as unknown, so a misspelt one is never
ignored. vLLM's additions that clients send are here too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tinkerapi.api.fields.field import Custom, Field, Flag, Integer, Number, Text, check_object
from tinkerapi.api.fields.prompts import check_num_prompts, check_plain_prompt
from tinkerapi.api.fields.refusals import refuse, refuse_size
from tinkerapi.api.fields.sampling import (
    SAMPLING_FIELDS,
    STOP_TEXT,
    check_num_samples,
    check_top_k,
    is_stop_text,
    stop_list,
)
from tinkerapi.api.fields.tokens import MAX_TOKEN_ID
from tinkerapi.api.openai.messages import check_messages, check_template_kwargs, check_tools
from training.errors import InvalidRequest
from training.types import Prompt

SMALLEST_SEED = -(2**63)

MAX_USER_CHARACTERS = 1000

MAX_TOP_LOGPROBS = 20

MAX_BIASES = 1024

_TOKEN_ID = re.compile("[0-9]{1,10}")

NOT_CONSTRAINED = (
    "this server cannot constrain the output; ask for the format in the prompt and check "
    "the answer, or leave it out"
)


NOT_HERE = "this server does not have this option; leave it out"


def _off(*values: Any, instead: str = NOT_HERE) -> Custom:
    """An option that this server does not have: only a value without effect is accepted."""

    def check(value: Any, where: str) -> None:
        if not any(value == off and type(value) in (type(off), int) for off in values):
            raise InvalidRequest(f"{where}: {instead}")

    return Custom(description="Not available.", checker=check, json={})


def _check_stop(value: Any, where: str) -> tuple[str, ...] | None:
    """Stop strings; without any, as with OpenAI, the model's end tokens stop."""
    stops = stop_list(value, where, "texts")
    for index, stop in enumerate(stops):
        if not is_stop_text(stop):
            raise refuse(f"{where}[{index}]", STOP_TEXT, stop)
    return tuple(stops) or None


def _check_top_k(value: Any, where: str) -> int:
    """As elsewhere; vLLM also takes 0 for no limit."""
    return -1 if type(value) is int and value == 0 else check_top_k(value, where)


def _check_logit_bias(value: Any, where: str) -> tuple[tuple[int, float], ...]:
    """``{"token id": bias}``, in the order of the ids."""
    if not isinstance(value, dict):
        raise refuse(where, 'an object such as {"50256": -100}', value)
    if len(value) > MAX_BIASES:
        raise refuse_size(where, len(value), "tokens", MAX_BIASES)
    biases: dict[int, float] = {}
    for name, bias in value.items():
        place = f"{where}.{name[:60]}"
        if not _TOKEN_ID.fullmatch(name) or int(name) > MAX_TOKEN_ID:
            raise InvalidRequest(f"{place}: expected a token id as the name, such as 50256")
        if int(name) in biases:
            raise InvalidRequest(f"{place}: names the token {int(name)} twice")
        biases[int(name)] = Number(description="", minimum=-100, maximum=100).check(bias, place)
    return tuple(sorted(biases.items()))


def _check_stream_options(value: Any, where: str) -> dict[str, Any]:
    fields = {
        "include_usage": Flag(description="End with the token counts.", default=False),
        "include_obfuscation": _off(False),
        "continuous_usage_stats": _off(False),
    }
    return check_object(fields, value, where)


def _check_prompts(value: Any, where: str) -> list[Prompt]:
    """Text or token ids, or a list of either."""
    if not isinstance(value, str | list):
        raise refuse(where, "text, token ids, or a list of either", value)
    if isinstance(value, str) or not value or type(value[0]) is int:
        return [_check_prompt(value, where)]
    check_num_prompts(len(value), where)
    return [_check_prompt(item, f"{where}[{index}]") for index, item in enumerate(value)]


def _check_prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str) or (isinstance(value, list) and type((value or [0])[0]) is int):
        return check_plain_prompt(value, where)
    raise refuse(where, "text or token ids", value)


def _check_tool_choice(value: Any, where: str) -> str:
    if value in ("none", "auto"):
        return str(value)
    raise InvalidRequest(
        f"{where}: expected 'none' or 'auto'; this server cannot make a model call a tool"
    )


def _max_tokens(minimum: int) -> Field:
    return _sampling("max_tokens", minimum=minimum)


def _sampling(name: str, **changes: Any) -> Field:
    """A sampling field of all dialects, with the changes for OpenAI's clients."""
    return replace(SAMPLING_FIELDS[name], **changes)


def _without_effect(max_length: int = MAX_USER_CHARACTERS) -> Text:
    """Fields that identify a request's user to OpenAI, or control its caches."""
    return Text(description="Without effect.", max_length=max_length)


_SHARED: Mapping[str, Field] = {
    "model": Text(
        description="A base model, or a `tinker://` path of sampler weights.",
        required=True,
        max_length=400,
    ),
    "n": Custom(description="Choices.", checker=check_num_samples, json={}, default=1),
    "stop": _sampling("stop", checker=_check_stop),
    "seed": _sampling("seed", minimum=SMALLEST_SEED),
    "temperature": _sampling("temperature"),
    "top_p": _sampling("top_p"),
    "frequency_penalty": _sampling("frequency_penalty"),
    "presence_penalty": _sampling("presence_penalty"),
    "logit_bias": Custom(
        description="Added to logits.", checker=_check_logit_bias, json={}, default=()
    ),
    "stream": Flag(description="Server-sent events.", default=False),
    "stream_options": Custom(
        description="Only with stream.", checker=_check_stream_options, json={}
    ),
    "user": _without_effect(),
}

_VLLM: Mapping[str, Field] = {
    "top_k": _sampling("top_k", checker=_check_top_k),
    "min_p": _sampling("min_p"),
    "repetition_penalty": _sampling("repetition_penalty"),
    "stop_token_ids": _sampling("stop_token_ids"),
    "ignore_eos": _sampling("ignore_eos"),
    "min_tokens": _off(0, instead="use ignore_eos with max_tokens for a text of a fixed length"),
    "prompt_logprobs": _off(
        instead="a completion with echo and logprobs has the prompt's log-probabilities"
    ),
    "include_stop_str_in_output": _off(False),
    "skip_special_tokens": _off(True, instead="the text is without special tokens; leave it out"),
    # Without special tokens there are no spaces between them.
    "spaces_between_special_tokens": Flag(description="Without effect.", default=True),
    "use_beam_search": _off(False),
    "length_penalty": _off(1.0),
    "early_stopping": _off(False),
    "allowed_token_ids": _off([], instead=NOT_CONSTRAINED),
    "bad_words": _off([], instead="give logit_bias -100 for tokens that are not to be drawn"),
    "truncate_prompt_tokens": _off(),
    "return_token_ids": _off(False),
    "return_tokens_as_token_ids": _off(False),
    "priority": _off(0),
    "structured_outputs": _off(instead=NOT_CONSTRAINED),
    "guided_json": _off(instead=NOT_CONSTRAINED),
    "guided_regex": _off(instead=NOT_CONSTRAINED),
    "guided_choice": _off(instead=NOT_CONSTRAINED),
    "guided_grammar": _off(instead=NOT_CONSTRAINED),
}

COMPLETION_FIELDS: Mapping[str, Field] = {
    **_SHARED,
    **_VLLM,
    "prompt": Custom(
        description="What to continue.", required=True, checker=_check_prompts, json={}
    ),
    "max_tokens": _max_tokens(0),
    "logprobs": Integer(
        description="Log-probabilities of the tokens, and of this many likeliest ones.",
        maximum=MAX_TOP_LOGPROBS,
    ),
    "echo": Flag(description="Return the prompt too, with its log-probabilities.", default=False),
    "suffix": _off(""),
    "best_of": Integer(description="Must equal n.", minimum=1),
    "response_format": _off({"type": "text"}, instead=NOT_CONSTRAINED),
    "add_special_tokens": _off(
        True, instead="special tokens are always added as the tokenizer does; send token ids"
    ),
}

CHAT_FIELDS: Mapping[str, Field] = {
    **_SHARED,
    **_VLLM,
    "messages": Custom(
        description="The conversation.", required=True, checker=check_messages, json={}
    ),
    "max_tokens": _max_tokens(1),
    "max_completion_tokens": _max_tokens(1),
    "logprobs": Flag(description="Log-probabilities of the tokens.", default=False),
    "top_logprobs": Integer(
        description="Number of likeliest tokens at each position.", maximum=MAX_TOP_LOGPROBS
    ),
    "tools": Custom(
        description="Passed to the template.", checker=check_tools, json={}, default=()
    ),
    "tool_choice": Custom(description="none or auto.", checker=_check_tool_choice, json={}),
    "parallel_tool_calls": Flag(description="Only true beside tools.", default=True),
    "add_generation_prompt": Flag(
        description="Whether the assistant begins a new message.", default=True
    ),
    "continue_final_message": Flag(description="Continue the last message.", default=False),
    "chat_template_kwargs": Custom(
        description="The template's variables.", checker=check_template_kwargs, json={}, default={}
    ),
    "response_format": _off({"type": "text"}, instead=NOT_CONSTRAINED),
    "modalities": _off(["text"]),
    "service_tier": _off("auto", "default"),
    "store": _off(False),
    "functions": _off([], instead="send tools instead"),
    "function_call": _off("none", "auto", instead="send tools and tool_choice instead"),
    "metadata": _off({}),
    "reasoning_effort": _off(
        "none", instead="send it in chat_template_kwargs, if the template reads it"
    ),
    "verbosity": _off("medium"),
    "echo": _off(False),
    "add_special_tokens": _off(False),
    "chat_template": _off(
        instead="the model's own template is used; to use another, send a prompt"
    ),
    "documents": _off([]),
    "include_reasoning": _off(True),
    **{
        name: _off()
        for name in (
            "audio",
            "moderation",
            "prediction",
            "prompt_cache_options",
            "web_search_options",
        )
    },
    "safety_identifier": _without_effect(),
    "prompt_cache_key": _without_effect(),
    "prompt_cache_retention": _without_effect(200),
}
