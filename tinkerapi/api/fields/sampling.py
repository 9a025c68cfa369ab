"""The sampling fields: one list, of which each dialect takes its part.

Names and defaults are those of ``training.types.SamplingParams``; a test compares them. If a
dialect writes a field in another form, it replaces only that part of the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.conf import settings

from tinkerapi.api.fields.field import Custom, Field, Flag, Integer, Number
from tinkerapi.api.fields.refusals import is_above, refuse, refuse_size
from tinkerapi.api.fields.tokens import MAX_TOKEN_ID
from training.errors import LimitExceeded
from training.types import SamplingParams

_PARAMS = SamplingParams()

MAX_STOPS = 64
MAX_STOP_CHARACTERS = 200

STOP_TEXT = f"text of 1 to {MAX_STOP_CHARACTERS} characters"
STOP_TOKEN = f"a token id from 0 to {MAX_TOKEN_ID}"


def check_num_samples(value: Any, where: str) -> int:
    """At least 1 and no more than the server's limit."""
    if is_above(value, settings.MAX_SAMPLES):
        raise LimitExceeded(
            f"{where}: {value} is too many; this server makes up to {settings.MAX_SAMPLES} "
            "sequences in one request"
        )
    if type(value) is not int or value < 1:
        raise refuse(where, "a whole number of at least 1", value)
    return value


def check_top_k(value: Any, where: str) -> int:
    """-1 for no limit, or at least 1."""
    if type(value) is not int or (value < 1 and value != -1) or value > MAX_TOKEN_ID:
        raise refuse(where, f"-1 (no limit) or a whole number from 1 to {MAX_TOKEN_ID}", value)
    return value


def check_stop(value: Any, where: str) -> tuple[str, ...] | tuple[int, ...]:
    """Stop strings or stop token ids; an empty list means no stops."""
    stops = stop_list(value, where, "texts or token ids")
    kind = type(stops[0]) if stops else str
    for index, stop in enumerate(stops):
        if not (is_stop_text(stop) or is_stop_token(stop)) or type(stop) is not kind:
            raise refuse(
                f"{where}[{index}]",
                f"all texts of 1 to {MAX_STOP_CHARACTERS} characters, or all token ids from 0 to "
                f"{MAX_TOKEN_ID}",
                stop,
            )
    return tuple(stops)


def check_stop_tokens(value: Any, where: str) -> tuple[int, ...]:
    """Token ids that end a sequence."""
    if not isinstance(value, list):
        raise refuse(where, f"a list of up to {MAX_STOPS} token ids", value)
    if len(value) > MAX_STOPS:
        raise refuse_size(where, len(value), "entries", MAX_STOPS)
    for index, token in enumerate(value):
        if not is_stop_token(token):
            raise refuse(f"{where}[{index}]", STOP_TOKEN, token)
    return tuple(value)


def stop_list(value: Any, where: str, nouns: str) -> list[Any]:
    """A list of stops, or one text in place of a list; its items are not checked."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise refuse(where, f"text, or a list of up to {MAX_STOPS} {nouns}", value)
    if len(stops) > MAX_STOPS:
        raise refuse_size(where, len(stops), "entries", MAX_STOPS)
    return stops


def is_stop_text(value: Any) -> bool:
    return type(value) is str and 0 < len(value) <= MAX_STOP_CHARACTERS


def is_stop_token(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_TOKEN_ID


def _penalty(description: str, default: float) -> Number:
    return Number(description=description, minimum=-2, maximum=2, default=default)


SAMPLING_FIELDS: Mapping[str, Field] = {
    "max_tokens": Integer(
        description="Most tokens of one sequence; the default is the server's.",
        minimum=1,
        maximum=lambda: settings.MAX_DATUM_TOKENS,
        example=32,
    ),
    "seed": Integer(description="Sequence i depends on the seed and i only."),
    "stop": Custom(
        description="Stop strings or token ids. Absent: the model's own end tokens; `[]`: "
        "nothing but max_tokens.",
        checker=check_stop,
        json={
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}},
                {"type": "array", "items": {"type": "integer", "minimum": 0}},
            ]
        },
    ),
    "temperature": Number(description="0 is greedy.", maximum=100, default=_PARAMS.temperature),
    "top_k": Custom(
        description="Choose among the k likeliest tokens; -1 is no limit.",
        checker=check_top_k,
        json={"type": "integer", "minimum": -1},
        default=_PARAMS.top_k,
    ),
    "top_p": Number(
        description="Choose among the likeliest tokens that together reach this probability.",
        above_minimum=True,
        maximum=1,
        default=_PARAMS.top_p,
    ),
    "min_p": Number(
        description="Smallest probability, relative to the likeliest token's.",
        maximum=1,
        default=_PARAMS.min_p,
    ),
    "stop_token_ids": Custom(
        description="Further tokens that end a sequence, beside `stop`.",
        checker=check_stop_tokens,
        json={"type": "array", "items": {"type": "integer", "minimum": 0}},
        default=_PARAMS.stop_token_ids,
    ),
    "ignore_eos": Flag(
        description="The model's end tokens do not end a sequence.", default=_PARAMS.ignore_eos
    ),
    "presence_penalty": _penalty(
        "Subtracted once for tokens that were sampled.", _PARAMS.presence_penalty
    ),
    "frequency_penalty": _penalty(
        "Subtracted for each time that a token was sampled.", _PARAMS.frequency_penalty
    ),
    "repetition_penalty": Number(
        description="For tokens in prompt and text.",
        minimum=0.01,
        maximum=100,
        default=_PARAMS.repetition_penalty,
    ),
}
"""Every sampling parameter except ``logit_bias``, which only OpenAI's clients send."""

TINKER_SAMPLING_FIELDS: Mapping[str, Field] = {
    name: SAMPLING_FIELDS[name]
    for name in ("max_tokens", "seed", "stop", "temperature", "top_k", "top_p")
}
"""The fields of ``sampling_params`` in the quick reference and in the tinker SDK."""
