"""Tokenizes a request's text, beside the engine's thread, or in it for a replay.

Input and output are plain values, so that another process can do it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from training.errors import ContextLengthExceeded, InvalidDatum, TrainingError
from training.kinds import ForwardBackward, Sample
from training.types import ChatOptions, Conversation, Datum, Prompt, TokenIds

Item = Datum | TokenIds
"""A conversation to train on, or a prompt, in tokens."""


class Text(Protocol):
    """The interface for tokenizing text; see ``training.engine.interface.Renderer``."""

    def render_conversation(
        self, messages: Sequence[Mapping[str, Any]], *, train_on: str, options: ChatOptions
    ) -> Datum: ...

    def render_prompt(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions
    ) -> list[int]: ...

    def encode(self, text: str) -> list[int]: ...


def tokens_of(
    text: Text,
    request: ForwardBackward | Sample,
    *,
    max_context_tokens: int,
    on_item: Callable[[], None] = lambda: None,
) -> list[Item]:
    """Every datum or prompt of a request in tokens; those that were tokens are unchanged.

    Args:
        on_item: Called before each item.

    Raises:
        TrainingError: One of them cannot be tokenized; the message names it.
    """
    items: list[Item] = []
    if isinstance(request, ForwardBackward):
        for index, datum in enumerate(request.data):
            on_item()
            items.append(
                _datum(text, datum, request.train_on, f"data[{index}]", max_context_tokens)
            )
        return items
    for index, prompt in enumerate(request.prompts):
        on_item()
        try:
            items.append(_prompt_tokens(text, prompt, max_context_tokens))
        except TrainingError as error:
            raise of_prompt(error, index, len(request.prompts)) from error
    return items


def _datum(text: Text, datum: Conversation | Datum, train_on: str, where: str, most: int) -> Datum:
    if isinstance(datum, Datum):
        return datum
    try:
        rendered = text.render_conversation(
            datum.to_dicts(), train_on=train_on, options=datum.options
        )
    except TrainingError as error:
        raise type(error)(f"{where}: {error}") from error
    _check_length(rendered, where, most)
    return rendered


def of_prompt(error: TrainingError, index: int, num_prompts: int) -> TrainingError:
    """The error with the index of its prompt, if the request has several."""
    if num_prompts == 1:
        return error
    return type(error)(f"prompt[{index}]: {str(error).removeprefix('prompt: ')}")


def _prompt_tokens(text: Text, prompt: Prompt, most: int) -> TokenIds:
    if not isinstance(prompt, Conversation | str):
        return prompt
    if isinstance(prompt, str):
        tokens = text.encode(prompt)
    else:
        tokens = text.render_prompt(prompt.to_dicts(), prompt.options)
    if len(tokens) > most:
        raise ContextLengthExceeded(
            f"prompt: {len(tokens)} tokens leave no room in the context: this model's maximum "
            f"context length is {most} tokens"
        )
    return np.array(tokens, np.int32)


def _check_length(rendered: Datum, where: str, most: int) -> None:
    """Refuse a conversation that is too long, with a message that does not speak of
    ``model_input``."""
    num_tokens = len(rendered.model_input)
    if num_tokens > most:
        raise InvalidDatum(
            f"{where}: the conversation is {num_tokens} tokens once rendered, and the model reads "
            f"at most {most}"
        )
