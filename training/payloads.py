"""Requests as the plain values that a future stores, and back.

A payload has the complete request: replaying it needs nothing else. Text is
stored as text; the worker, which has the tokenizer, turns it into tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from training.images import Chunks, Image
from training.loss_fns import WEIGHTS
from training.types import (
    NO_CHAT_OPTIONS,
    AdamParams,
    ChatOptions,
    Conversation,
    Datum,
    ImageDatum,
    LoraConfig,
    Message,
    Prompt,
    SamplingParams,
    ScoringParams,
    Unrendered,
)

Payload = dict[str, Any]

CHARACTERS_PER_TOKEN = 3
"""A cautious estimate for text that is not tokenized yet."""


_FIRST_SAMPLING_PARAMS = frozenset({"max_tokens", "seed", "stop", "temperature", "top_k", "top_p"})
"""Parameters that every stored sample has."""


def unrendered_to_payload(item: Unrendered) -> Payload:
    """An example with text or images, which only the worker can render."""
    if isinstance(item, Conversation):
        return conversation_to_payload(item)
    chunks = _chunks_to_payload(item.model_input)
    return {"chunks": chunks, "loss_fn_inputs": dict(item.loss_fn_inputs)}


def with_weights_of_one(data: Sequence[Datum | ImageDatum]) -> list[Datum | ImageDatum]:
    """The datums, with cross_entropy's weights set to 1 if absent, as in the engine.

    Payloads have had this form since the first version; see ``sampling_params_to_payload``.
    """
    return [
        replace(datum, loss_fn_inputs={**inputs, WEIGHTS: np.ones(targets.shape, np.float32)})
        if WEIGHTS not in (inputs := datum.loss_fn_inputs)
        and (targets := inputs.get("target_tokens")) is not None
        else datum
        for datum in data
    ]


def unrendered_from_payload(item: Mapping[str, Any]) -> Unrendered:
    """The inverse of ``unrendered_to_payload``."""
    if "messages" in item:
        return conversation_from_payload(item)
    chunks = _chunks_from_payload(item["chunks"])
    return ImageDatum(model_input=chunks, loss_fn_inputs=item["loss_fn_inputs"])


def prompt_to_payload(prompt: Prompt) -> Payload:
    """A prompt as plain values, its form as the key."""
    if isinstance(prompt, Conversation):
        return conversation_to_payload(prompt)
    if isinstance(prompt, str):
        return {"text": prompt}
    if isinstance(prompt, Chunks):
        return {"chunks": _chunks_to_payload(prompt)}
    return {"tokens": np.asarray(prompt, np.int32)}


def prompt_from_payload(item: Mapping[str, Any]) -> Prompt:
    """The inverse of ``prompt_to_payload``, also for versions that stored token ids as a list."""
    if "messages" in item:
        return conversation_from_payload(item)
    if "chunks" in item:
        return _chunks_from_payload(item["chunks"])
    return item["text"] if "text" in item else np.asarray(item["tokens"], np.int32)


def prompt_payload_named(item: Payload) -> Payload:
    """A prompt's payload in the form that names a repeated request: there token ids are a list, as
    versions before stored them."""
    return {"tokens": item["tokens"].tolist()} if "tokens" in item else item


def lora_config_to_payload(config: LoraConfig) -> Payload:
    """A setting of later versions is stored only if it is not the default; see
    ``sampling_params_to_payload``."""
    payload = asdict(config)
    if config.share_across_experts:
        del payload["share_across_experts"]
    return payload


def lora_config_from_payload(item: Mapping[str, Any]) -> LoraConfig:
    modules = item["target_modules"]
    return LoraConfig(**{**item, "target_modules": None if modules is None else tuple(modules)})


def adam_params_to_payload(params: AdamParams) -> Payload:
    return asdict(params)


def adam_params_from_payload(item: Mapping[str, Any]) -> AdamParams:
    return AdamParams(**item)


def sampling_params_to_payload(params: SamplingParams) -> Payload:
    """Options of later versions are stored only if they are used: a request that is repeated
    after an upgrade has the digest that it had before."""
    defaults = vars(SamplingParams())
    return {
        name: value
        for name, value in asdict(params).items()
        if name in _FIRST_SAMPLING_PARAMS or value != defaults[name]
    }


def sampling_params_from_payload(item: Mapping[str, Any]) -> SamplingParams:
    return SamplingParams(**{name: _tuples(value) for name, value in item.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def scoring_params_to_payload(params: ScoringParams) -> Payload:
    """Only the options that are set; without any, an empty dictionary."""
    asked = vars(params).items()
    return {
        name: value
        for name, value in asked
        if not (value is None or (type(value) is int and not value))
    }


def scoring_params_from_payload(item: Mapping[str, Any]) -> ScoringParams:
    return ScoringParams(**item)


def unrendered_cost(item: Unrendered) -> int:
    """Tokens to train on, estimated."""
    return prompt_cost(item if isinstance(item, Conversation) else item.model_input)


def prompt_cost(prompt: Prompt) -> int:
    """Tokens to read, estimated for text and images."""
    if isinstance(prompt, Conversation):
        return conversation_cost(prompt)
    if isinstance(prompt, Chunks):
        return prompt.num_text_tokens + sum(image.cost for image in prompt.images)
    return len(prompt) // CHARACTERS_PER_TOKEN + 1 if isinstance(prompt, str) else len(prompt)


def conversation_cost(conversation: Conversation) -> int:
    """Tokens of a conversation, estimated."""
    # Five tokens frame each message in ChatML.
    text = sum(
        count_characters(message) // CHARACTERS_PER_TOKEN + 5 for message in conversation.messages
    ) + (count_characters(conversation.options.tools) // CHARACTERS_PER_TOKEN)
    return text + sum(image.cost for image in conversation.images)


def count_characters(value: Any) -> int:
    """The approximate length of a value in a template's output, without JSON syntax and images."""
    if value is None or isinstance(value, Image):
        return 0
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Message):
        extras = (value.name, value.tool_calls, value.tool_call_id, value.reasoning_content)
        return count_characters(value.content) + sum(map(count_characters, extras))
    if isinstance(value, Mapping):
        return sum(len(key) + count_characters(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(map(count_characters, value))
    return len(str(value))


def conversation_to_payload(conversation: Conversation) -> Payload:
    """A plain conversation is stored as in the first version, so that its digest stays the same."""
    options = conversation.options
    chosen = {
        name: value
        for name, value in (
            ("tools", None if options.tools is None else list(options.tools)),
            ("add_generation_prompt", options.add_generation_prompt),
            ("continue_final_message", options.continue_final_message),
            ("template_kwargs", dict(options.template_kwargs)),
        )
        if value != getattr(NO_CHAT_OPTIONS, name)
    }
    messages = [_message_to_payload(message) for message in conversation.messages]
    return {"messages": messages, **({"options": chosen} if chosen else {})}


def _message_to_payload(message: Message) -> list[str] | Payload:
    """``[role, content]``, or an object if more fields are set or the content has images."""
    given = message.to_dict()
    if isinstance(message.content, tuple):
        parts = [
            part if isinstance(part, str) else _image_to_payload(part) for part in message.content
        ]
        return {**given, "content": parts}
    if len(given) == 2 and message.content is not None:
        return [message.role, message.content]
    return given


def _chunks_to_payload(chunks: Chunks) -> list[Any]:
    """Arrays of token ids, and images."""
    return [
        _image_to_payload(chunk) if isinstance(chunk, Image) else chunk for chunk in chunks.chunks
    ]


def _chunks_from_payload(items: Sequence[Any]) -> Chunks:
    return Chunks(
        chunks=tuple(
            _image_from_payload(item) if isinstance(item, Mapping) else item for item in items
        )
    )


def _image_to_payload(image: Image) -> Payload:
    """Its bytes as they are."""
    given = {} if image.expected_tokens is None else {"expected_tokens": image.expected_tokens}
    return {"data": image.data, "format": image.format, **given}


def _image_from_payload(item: Mapping[str, Any]) -> Image:
    return Image(**item)


def conversation_from_payload(item: Mapping[str, Any]) -> Conversation:
    """The inverse of ``conversation_to_payload``."""
    messages = tuple(_message_from_payload(message) for message in item["messages"])
    return Conversation(messages, _options_from_payload(item.get("options", {})))


def _message_from_payload(item: Sequence[str] | Mapping[str, Any]) -> Message:
    if not isinstance(item, Mapping):
        role, content = item
        return Message(role, content)
    calls = item.get("tool_calls")
    extras: Payload = {"tool_calls": None if calls is None else tuple(calls)}
    if isinstance(item["content"], list):
        extras["content"] = tuple(
            part if isinstance(part, str) else _image_from_payload(part) for part in item["content"]
        )
    return Message(**{**item, **extras})


def _options_from_payload(item: Mapping[str, Any]) -> ChatOptions:
    tools = item.get("tools")
    return ChatOptions(**{**item, "tools": None if tools is None else tuple(tools)})
