"""Checks at the start whether a model's conversations can be trained on, and why not.

The check tests the promise: the tokens of a conversation are those of transformers'
``apply_chat_template`` (or its text's, cut where a prompt ends: see ``edges``); they begin
with the prompt's tokens; the trained ones follow them, up to a token on which
sampling stops. Every request is checked for the same later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from training.engine.renderer.chat_template import ChatTemplate, Message
from training.engine.renderer.message_spans import require_all_written
from training.errors import InvalidRequest
from training.types import NO_CHAT_OPTIONS

if TYPE_CHECKING:
    from training.engine.renderer.chat_renderer import ChatRenderer

_QUESTION: Message = {"role": "user", "content": "Where is Zürich?"}
_ANSWER: Message = {"role": "assistant", "content": "In Switzerland."}
_MORE: list[Message] = [
    {"role": "user", "content": "and 東京 \N{GRINNING FACE}"},
    {"role": "assistant", "content": "it's\n\n  in Japan"},
]
_PLAIN = [_QUESTION, _ANSWER]
_SHAPES: list[list[Message]] = [
    _PLAIN,
    [{"role": "system", "content": "Be brief."}, *_PLAIN],
    [*_PLAIN, *_MORE],
]


def find_fault(renderer: ChatRenderer, template: ChatTemplate) -> str | None:
    """Why this model's conversations cannot be trained on, in one sentence; None if they can.

    A conversation that the template refuses, or a message that it leaves out (many have no system
    message), is not a fault.
    """
    for messages in _SHAPES:
        try:
            template.check(messages, NO_CHAT_OPTIONS)
            text = template.render(messages, NO_CHAT_OPTIONS)
            require_all_written(template, messages, NO_CHAT_OPTIONS, text)
        except InvalidRequest as error:
            if messages is _PLAIN:
                return str(error).rstrip(".")
            continue
        try:
            fault = _fault_of(messages, renderer, template)
        except InvalidRequest as error:
            fault = str(error)
        if fault is not None:
            return fault.rstrip(".")
    return None


def _fault_of(
    messages: Sequence[Message], renderer: ChatRenderer, template: ChatTemplate
) -> str | None:
    datum = renderer.training_datum(messages, NO_CHAT_OPTIONS, everyone=False)
    targets, weights = (datum.loss_fn_inputs[name] for name in ("target_tokens", "weights"))
    tokens = [int(datum.model_input[0]), *targets.tolist()]
    own = template.tokenize(messages)
    if tokens[: len(own)] != own and renderer.written_out(tokens) != renderer.written_out(own):
        return "the tokens of a conversation are not those of its own template"
    trained = [int(position) + 1 for position in weights.nonzero()[0]]
    prompt = renderer.render_prompt(messages[:-1])
    last_answer = [position for position in trained if position >= len(prompt)]
    if tokens[: len(prompt)] != prompt or last_answer[:1] != [len(prompt)]:
        return "its text before an answer is not the prompt that an answer is sampled after"
    if tokens[last_answer[-1]] not in renderer.end_token_ids:
        return "sampling does not stop on the token that ends a trained answer"
    return None
