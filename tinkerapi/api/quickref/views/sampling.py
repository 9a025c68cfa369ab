"""Sampling: sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from django.conf import settings

from tinkerapi.api.fields.field import Custom, Field, Flag, Object, Schema, Text
from tinkerapi.api.fields.sampling import TINKER_SAMPLING_FIELDS, check_num_samples
from tinkerapi.api.quickref.data_schema import CONVERSATION_SCHEMA, PROMPT_SCHEMA
from tinkerapi.api.quickref.parse import check_conversation, check_prompt, check_prompts
from tinkerapi.api.quickref.views.base import OperationView
from tinkerapi.api.quickref.views.steps import MODEL_ID
from training.errors import InvalidRequest, LimitExceeded
from training.services import Submission, sample_submit
from training.types import Prompt, SamplingParams


class SampleView(OperationView):
    """Continue one or several prompts.

    Give one of `messages`, `prompt` and `prompts`, and one of `model_id` (your model
    after every request submitted to it before), `model_path` (a checkpoint) and `base_model`.
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
            description="How tokens are chosen and when a sequence ends.",
            fields=TINKER_SAMPLING_FIELDS,
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
