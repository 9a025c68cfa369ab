"""Tokenizes a request's text, beside the engine's thread, or in it for a replay.

Input and output are plain values, so that another process can do it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from training.errors import ContextLengthExceeded, InvalidDatum, InvalidRequest, TrainingError
from training.images import Chunks, Image
from training.kinds import ForwardBackward, Sample
from training.types import (
    ChatOptions,
    Conversation,
    Datum,
    Example,
    ImageDatum,
    Prompt,
    TokenPrompt,
    images_of,
)

Item = Datum | TokenPrompt
"""An example to train on, or a prompt, in tokens."""


class Text(Protocol):
    """The interface for tokenizing text; see ``training.engine.interface.Renderer``."""

    @property
    def image_fault(self) -> str | None: ...

    def render_conversation(
        self, messages: Sequence[Mapping[str, Any]], *, train_on: str, options: ChatOptions
    ) -> Datum: ...

    def render_prompt(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions
    ) -> list[int]: ...

    def render_image_prompt(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions
    ) -> TokenPrompt: ...

    def place_images(self, chunks: Chunks) -> TokenPrompt: ...

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


def _datum(text: Text, datum: Example, train_on: str, where: str, most: int) -> Datum:
    if isinstance(datum, Datum):
        return datum
    if images_of(datum) and text.image_fault is not None:
        raise InvalidDatum(f"{where}{_first_image(datum)}: {text.image_fault}")
    if isinstance(datum, ImageDatum):
        return _image_datum(text, datum, where)
    try:
        rendered = text.render_conversation(
            datum.to_dicts(), train_on=train_on, options=datum.options
        )
    except TrainingError as error:
        raise type(error)(f"{where}: {error}") from error
    _check_length(rendered, where, most)
    return rendered


def _image_datum(text: Text, datum: ImageDatum, where: str) -> Datum:
    try:
        placed = text.place_images(datum.model_input)
    except TrainingError as error:
        raise type(error)(f"{where}.model_input.{error}") from error
    return Datum(
        model_input=placed.tokens, loss_fn_inputs=datum.loss_fn_inputs, images=placed.images
    )


def _first_image(item: Example | Prompt) -> str:
    """The place of an item's first image in it, such as ``.model_input.chunks[1]``."""
    if isinstance(item, ImageDatum):
        return f".model_input{_first_image(item.model_input)}"
    if isinstance(item, Chunks):
        first = next(n for n, chunk in enumerate(item.chunks) if isinstance(chunk, Image))
        return f".chunks[{first}]"
    if isinstance(item, Conversation):
        first = next(n for n, message in enumerate(item.messages) if message.images)
        return f".messages[{first}].content"
    return ""


def of_prompt(error: TrainingError, index: int, num_prompts: int) -> TrainingError:
    """The error with the index of its prompt, if the request has several."""
    if num_prompts == 1:
        return error
    if str(error).startswith("prompt."):  # a place in it
        return type(error)(f"prompt[{index}]{str(error).removeprefix('prompt')}")
    return type(error)(f"prompt[{index}]: {str(error).removeprefix('prompt: ')}")


def _prompt_tokens(text: Text, prompt: Prompt, most: int) -> TokenPrompt:
    if isinstance(prompt, np.ndarray):
        return TokenPrompt(tokens=prompt)
    if images_of(prompt) and text.image_fault is not None:
        raise InvalidRequest(f"prompt{_first_image(prompt)}: {text.image_fault}")
    if isinstance(prompt, str):
        rendered = TokenPrompt(tokens=np.array(text.encode(prompt), np.int32))
    elif isinstance(prompt, Chunks):
        try:
            rendered = text.place_images(prompt)
        except TrainingError as error:
            raise type(error)(f"prompt.{error}") from error
    elif prompt.images:
        rendered = text.render_image_prompt(prompt.to_dicts(), prompt.options)
    else:
        tokens = text.render_prompt(prompt.to_dicts(), prompt.options)
        rendered = TokenPrompt(tokens=np.array(tokens, np.int32))
    if len(rendered.tokens) > most:
        raise ContextLengthExceeded(
            f"prompt: {len(rendered.tokens)} tokens leave no room in the context: this model's "
            f"maximum context length is {most} tokens"
        )
    return rendered


def _check_length(rendered: Datum, where: str, most: int) -> None:
    """Refuse a conversation that is too long, with a message that does not speak of
    ``model_input``."""
    num_tokens = len(rendered.model_input)
    if num_tokens > most:
        raise InvalidDatum(
            f"{where}: the conversation is {num_tokens} tokens once rendered, and the model reads "
            f"at most {most}"
        )
