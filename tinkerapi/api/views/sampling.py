"""Sampling: sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from django.conf import settings

from tinkerapi.api.data import (
    CONVERSATION_SCHEMA,
    MAX_TOKEN_ID,
    PROMPT_SCHEMA,
    check_conversation,
    check_prompt,
    check_prompts,
)
from tinkerapi.api.fields import (
    Custom,
    Field,
    Flag,
    Integer,
    Number,
    Object,
    Schema,
    Text,
    is_above,
    refuse,
    refuse_size,
)
from tinkerapi.api.views.base import OperationView
from tinkerapi.api.views.steps import MODEL_ID
from training.errors import InvalidRequest, LimitExceeded
from training.services import Submission, sample_submit
from training.types import Prompt, SamplingParams

_PARAMS = SamplingParams()

MAX_STOPS = 64
MAX_STOP_CHARACTERS = 200


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
    """Stop strings or stop token ids; an empty list means to stop at nothing."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise refuse(where, f"text, or a list of up to {MAX_STOPS} texts or token ids", value)
    if len(stops) > MAX_STOPS:
        raise refuse_size(where, len(stops), "entries", MAX_STOPS)
    kind = type(stops[0]) if stops else str
    for index, stop in enumerate(stops):
        good_text = type(stop) is str and 0 < len(stop) <= MAX_STOP_CHARACTERS
        good_token = type(stop) is int and 0 <= stop <= MAX_TOKEN_ID
        if not (good_text or good_token) or type(stop) is not kind:
            raise refuse(
                f"{where}[{index}]",
                f"all texts of 1 to {MAX_STOP_CHARACTERS} characters, or all token ids from 0 to "
                f"{MAX_TOKEN_ID}",
                stop,
            )
    return tuple(stops)


SAMPLING_PARAMS = {
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
}


class SampleView(OperationView):
    """Continue one or several prompts.

    Give one of `messages`, `prompt` and `prompts`, and one of `model_id` (your model as it is
    after everything submitted to it before), `model_path` (a checkpoint) and `base_model`.
    Log-probabilities are in nats.
    """

    group = "Sampling"
    takes_data = True
    fields: ClassVar[Mapping[str, Field]] = {
        "model_id": replace(MODEL_ID, required=False),
        "model_path": Text(
            description="A checkpoint, such as `tinker://my_model/sampler_weights/first`.",
            max_length=400,
        ),
        "base_model": Text(description="A base model without an adapter.", max_length=255),
        "messages": Custom(
            description="A conversation to continue as the assistant.",
            checker=check_conversation,
            json=CONVERSATION_SCHEMA,
            example=[{"role": "user", "content": "Say hi."}],
        ),
        "prompt": Custom(
            description='Text, or token ids as a list or `{"chunks": [{"tokens": [...]}]}`.',
            checker=check_prompt,
            json=PROMPT_SCHEMA,
        ),
        "prompts": Custom(
            description="Several prompts at once, each text, token ids or a conversation.",
            checker=check_prompts,
            json={"type": "array", "items": PROMPT_SCHEMA, "minItems": 1},
        ),
        "num_samples": Custom(
            description="Sequences for each prompt.",
            checker=check_num_samples,
            json={"type": "integer", "minimum": 1},
            default=1,
        ),
        "sampling_params": Object(
            description="How tokens are chosen and when a sequence ends.", fields=SAMPLING_PARAMS
        ),
        "prompt_logprobs": Flag(
            description="Also return the log-probability of every prompt token.", default=False
        ),
    }
    answer: ClassVar[Schema] = {
        "type": "object",
        "properties": {
            "generated_text": {"type": "string", "description": "The first completion."},
            "completions": {"type": "array", "items": {"type": "string"}},
            "sequences": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "stop_reason": {"type": "string", "enum": ["stop", "length"]},
                        "tokens": {"type": "array", "items": {"type": "integer"}},
                        "logprobs": {"type": "array", "items": {"type": "number"}},
                        "text": {"type": "string"},
                    },
                    "required": ["stop_reason", "tokens", "logprobs", "text"],
                },
            },
            "prompt_logprobs": {
                "type": "array",
                "nullable": True,
                "items": {"type": "number", "nullable": True},
            },
            "model_id": {"type": "string", "nullable": True},
        },
        "required": ["generated_text", "completions", "sequences"],
    }
    answer_example: ClassVar[Any] = {
        "generated_text": "Hi!",
        "completions": ["Hi!"],
        "sequences": [
            {"stop_reason": "stop", "tokens": [26843, 2], "logprobs": [-0.2, -0.1], "text": "Hi!"}
        ],
        "prompt_logprobs": None,
        "model_id": "my_model",
    }
    errors: ClassVar[Mapping[int, str]] = {404: "No such model, checkpoint or base model."}

    def submit(
        self, body: dict[str, Any], *, owner_id: int, idempotency_key: str | None
    ) -> Submission:
        prompts = _prompts(body)
        total = len(prompts) * body["num_samples"]
        if total > settings.MAX_SAMPLES:
            raise LimitExceeded(
                f"num_samples: {total} sequences in all; this server makes up to "
                f"{settings.MAX_SAMPLES} in one request"
            )
        return sample_submit(
            owner_id=owner_id,
            model_id=body["model_id"],
            base_model=body["base_model"],
            model_path=body["model_path"],
            prompts=prompts,
            num_samples=body["num_samples"],
            sampling_params=SamplingParams(**body["sampling_params"]),
            prompt_logprobs=body["prompt_logprobs"],
            idempotency_key=idempotency_key,
        )


def _prompts(body: Mapping[str, Any]) -> list[Prompt]:
    given = [name for name in ("messages", "prompt", "prompts") if body[name] is not None]
    if len(given) != 1:
        raise InvalidRequest("messages, prompt, prompts: give exactly one of them")
    value = body[given[0]]
    return value if given[0] == "prompts" else [value]
