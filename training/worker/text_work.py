"""A request's text as tokens: what is done beside the engine's thread, or on it in a replay.

The work is plain values in and out, so that another process can do it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from training import payloads
from training.errors import ContextLengthExceeded, InvalidDatum, TrainingError
from training.types import ChatOptions, Conversation, Datum, Prompt

Item = Datum | list[int]
"""A conversation to train on, or a prompt, in tokens."""


class Text(Protocol):
    """What makes tokens of text; see ``training.engine.interface.Renderer``."""

    def render_conversation(
        self, messages: Sequence[Mapping[str, Any]], *, train_on: str, options: ChatOptions
    ) -> Datum: ...

    def render_prompt(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions
    ) -> list[int]: ...

    def encode(self, text: str) -> list[int]: ...


def has_text(payload: Mapping[str, Any]) -> bool:
    """Whether a request's payload holds text that has to become tokens."""
    if any("messages" in item for item in payload.get("data", ())):
        return True
    return any("tokens" not in item for item in payload.get("prompts", ()))


def tokens_of(
    text: Text,
    payload: Mapping[str, Any],
    *,
    max_context_tokens: int,
    on_item: Callable[[], None] = lambda: None,
) -> list[Item]:
    """Every datum or prompt of a request in tokens; those that were tokens are as they were.

    Args:
        on_item: Called before each item.

    Raises:
        TrainingError: One of them cannot be; the message names it.
    """
    items: list[Item] = []
    for index, datum in enumerate(payloads.data_from_payload(payload.get("data", ()))):
        on_item()
        where = f"data[{index}]"
        if isinstance(datum, Conversation):
            try:
                datum = text.render_conversation(
                    datum.to_dicts(), train_on=payload["train_on"], options=datum.options
                )
            except TrainingError as error:
                raise type(error)(f"{where}: {error}") from error
            _check_length(datum, where, max_context_tokens)
        items.append(datum)
    prompts = [payloads.prompt_from_payload(item) for item in payload.get("prompts", ())]
    for index, prompt in enumerate(prompts):
        on_item()
        try:
            items.append(_prompt_tokens(text, prompt, max_context_tokens))
        except TrainingError as error:
            raise of_prompt(error, index, len(prompts)) from error
    return items


def of_prompt(error: TrainingError, index: int, num_prompts: int) -> TrainingError:
    """The error with the place of its prompt, where the request has several."""
    if num_prompts == 1:
        return error
    return type(error)(f"prompt[{index}]: {str(error).removeprefix('prompt: ')}")


def _prompt_tokens(text: Text, prompt: Prompt, most: int) -> list[int]:
    if not isinstance(prompt, Conversation | str):
        return list(prompt)
    if isinstance(prompt, str):
        tokens = text.encode(prompt)
    else:
        tokens = text.render_prompt(prompt.to_dicts(), prompt.options)
    if len(tokens) > most:
        raise ContextLengthExceeded(
            f"prompt: {len(tokens)} tokens leave no room in the context: this model's maximum "
            f"context length is {most} tokens"
        )
    return tokens


def _check_length(rendered: Datum, where: str, most: int) -> None:
    """Refuse a conversation that is too long in words of its own: it named no ``model_input``."""
    num_tokens = len(rendered.model_input)
    if num_tokens > most:
        raise InvalidDatum(
            f"{where}: the conversation is {num_tokens} tokens once rendered, and the model reads "
            f"at most {most}"
        )
