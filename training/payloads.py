"""Requests as the plain values that a future stores, and back.

A payload holds what the client asked for, in full: replaying it needs nothing else. Text is
stored as text; the worker, which has the tokenizer, turns it into tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from training.types import (
    AdamParams,
    Conversation,
    Datum,
    LoraConfig,
    Message,
    Prompt,
    SamplingParams,
    ScoringParams,
)

Payload = dict[str, Any]

CHARACTERS_PER_TOKEN = 3
"""A cautious guess for the cost of text that is not tokenised yet."""


def data_to_payload(data: Sequence[Conversation | Datum]) -> list[Payload]:
    """Training examples as plain values."""
    return [
        {"messages": _messages_to_payload(item)}
        if isinstance(item, Conversation)
        else {"model_input": item.model_input, "loss_fn_inputs": dict(item.loss_fn_inputs)}
        for item in data
    ]


def data_from_payload(items: Sequence[Mapping[str, Any]]) -> list[Conversation | Datum]:
    """What ``data_to_payload`` was given."""
    return [
        _messages_from_payload(item["messages"])
        if "messages" in item
        else Datum(model_input=item["model_input"], loss_fn_inputs=item["loss_fn_inputs"])
        for item in items
    ]


def prompt_to_payload(prompt: Prompt) -> Payload:
    """A prompt as plain values, its form as the key."""
    if isinstance(prompt, Conversation):
        return {"messages": _messages_to_payload(prompt)}
    if isinstance(prompt, str):
        return {"text": prompt}
    return {"tokens": list(prompt)}


def prompt_from_payload(item: Mapping[str, Any]) -> Prompt:
    """What ``prompt_to_payload`` was given."""
    if "messages" in item:
        return _messages_from_payload(item["messages"])
    return item["text"] if "text" in item else tuple(item["tokens"])


def lora_config_to_payload(config: LoraConfig) -> Payload:
    return asdict(config)


def lora_config_from_payload(item: Mapping[str, Any]) -> LoraConfig:
    modules = item["target_modules"]
    return LoraConfig(**{**item, "target_modules": None if modules is None else tuple(modules)})


def adam_params_to_payload(params: AdamParams) -> Payload:
    return asdict(params)


def adam_params_from_payload(item: Mapping[str, Any]) -> AdamParams:
    return AdamParams(**item)


def sampling_params_to_payload(params: SamplingParams) -> Payload:
    return asdict(params)


def sampling_params_from_payload(item: Mapping[str, Any]) -> SamplingParams:
    stop = item["stop"]
    return SamplingParams(**{**item, "stop": None if stop is None else tuple(stop)})


def scoring_params_to_payload(params: ScoringParams) -> Payload:
    """Only what was asked for; nothing asked is an empty dictionary."""
    asked = vars(params).items()
    return {
        name: value
        for name, value in asked
        if not (value is None or (type(value) is int and not value))
    }


def scoring_params_from_payload(item: Mapping[str, Any]) -> ScoringParams:
    return ScoringParams(**item)


def data_cost(data: Sequence[Conversation | Datum]) -> int:
    """Tokens to train on, estimated for text."""
    return sum(
        _conversation_cost(item) if isinstance(item, Conversation) else len(item.model_input)
        for item in data
    )


def prompt_cost(prompt: Prompt) -> int:
    """Tokens to read, estimated for text."""
    if isinstance(prompt, Conversation):
        return _conversation_cost(prompt)
    return len(prompt) // CHARACTERS_PER_TOKEN + 1 if isinstance(prompt, str) else len(prompt)


def _conversation_cost(conversation: Conversation) -> int:
    # Five tokens frame each message in ChatML.
    return sum(
        len(message.content) // CHARACTERS_PER_TOKEN + 5 for message in conversation.messages
    )


def _messages_to_payload(conversation: Conversation) -> list[list[str]]:
    return [[message.role, message.content] for message in conversation.messages]


def _messages_from_payload(items: Sequence[Sequence[str]]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in items))
