"""Examples and samples as tokens with numbers for each, for people.

Nothing is read here: ``training.inspection`` reads the requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.images import Chunks, Image
from training.kinds.sample_result import SequenceResult
from training.loss_fns import ADVANTAGES, LOGPROBS, TARGET_TOKENS, WEIGHTS
from training.types import Conversation, Datum, Example, Message, Prompt
from training.vocabulary import TokenTable

MAX_TOKENS = 20_000
"""Tokens that one view shows."""

NO_TOKEN = -1
"""Stands for a token of an image."""

Numbers = list[float | None]

WEIGHT, ADVANTAGE, SAMPLED, TRAINED, RATIO = "weight", "advantage", "sampled", "trained", "ratio"
"""Columns: the loss weight, the advantage, the sampler's and the trainer's log-probability, and
the trainer's probability by the sampler's."""


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """Tokens in order, with numbers for each."""

    ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    columns: Mapping[str, Numbers] = field(default_factory=dict)
    """Name to a number for each token, or None where there is none."""
    top: list[list[tuple[str, float]]] = field(default_factory=list)
    """The likeliest tokens at each position, for a sample that recorded them."""
    prompt_length: int = 0
    """Tokens before the first one that was trained or sampled."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know of this view."""
    messages: list[tuple[str, str]] = field(default_factory=list)
    """Role and text, if the client sent a conversation."""
    images: Sequence[Image] = ()
    """The images among the tokens or in the messages, in order."""


def example_view(
    item: Example,
    trained: NDArray[Any] | None,
    table: TokenTable | None,
    rendered: Datum | None = None,
) -> TokenView:
    """One training example.

    Args:
        trained: The trainer's log-probabilities of its targets, in nats.
        rendered: The tokens that the worker made of the example, if it was text or has images.
    """
    if rendered is not None and not isinstance(item, Datum):
        images = _images(item) if isinstance(item, Conversation) else item.model_input.images
        return replace(_datum_view(rendered, trained, table), images=images)
    if isinstance(item, Conversation):
        return _conversation_view(item, trained)
    if isinstance(item, Datum):
        return _datum_view(item, trained, table)
    images = item.model_input.images
    if item.model_input.num_tokens is None:
        note = "The client did not say how many tokens each image is; the worker placed them."
        return TokenView(notes=[note], images=images)
    ids = [
        np.full(chunk.expected_tokens or 0, NO_TOKEN) if isinstance(chunk, Image) else chunk
        for chunk in item.model_input.chunks
    ]
    placed = Datum(
        model_input=np.concatenate(ids).astype(np.int32), loss_fn_inputs=item.loss_fn_inputs
    )
    return replace(_datum_view(placed, trained, table), images=images)


def sample_view(prompt: Prompt, sequence: SequenceResult, table: TokenTable | None) -> TokenView:
    """One sampled sequence, after its prompt."""
    notes: list[str] = []
    messages: list[tuple[str, str]] = []
    before: list[int] = []
    images: list[Image] = []
    if isinstance(prompt, Conversation):
        messages, images = _messages(prompt), _images(prompt)
    elif isinstance(prompt, str):
        messages = [("text", prompt)]
    elif isinstance(prompt, Chunks):
        images = prompt.images
        notes.append("The prompt has images; shown are its completion's tokens.")
    else:
        before = np.asarray(prompt).tolist()
    ids = [*before, *sequence.tokens.tolist()]
    none: Numbers = [None] * len(before)
    top: list[list[tuple[str, float]]] = []
    if sequence.top is not None and table is not None:
        rows = zip(sequence.top.token_ids.tolist(), sequence.top.logprobs.tolist(), strict=True)
        top = [[] for _ in before] + [
            [(table.text([id_]), value) for id_, value in zip(*row, strict=True)] for row in rows
        ]
    return _cut(
        TokenView(
            ids=ids,
            texts=_texts(ids, table, notes),
            columns={SAMPLED: none + _numbers(sequence.logprobs)},
            top=top,
            prompt_length=len(before),
            notes=notes,
            messages=messages,
            images=images,
        )
    )


def _datum_view(datum: Datum, trained: NDArray[Any] | None, table: TokenTable | None) -> TokenView:
    """The first input token, and then the targets, each with the numbers of its prediction."""
    inputs, notes = dict(datum.loss_fn_inputs), []
    first, shape = datum.model_input[:1].tolist(), (len(datum.model_input),)
    targets = np.asarray(inputs.pop(TARGET_TOKENS, datum.model_input))
    if targets.ndim == 2:
        best = np.argmax(np.asarray(inputs.get(WEIGHTS, np.ones(targets.shape))), axis=1)[:, None]
        notes.append(f"{targets.shape[1]} targets at each position; shown is the heaviest.")
        pick = {name: v for name, v in inputs.items() if np.shape(v) == targets.shape}
        inputs |= {name: np.take_along_axis(v, best, 1)[:, 0] for name, v in pick.items()}
        if trained is not None and trained.shape == targets.shape:
            trained = np.take_along_axis(trained, best, 1)[:, 0]
        targets = np.take_along_axis(targets, best, 1)[:, 0]
    differing = int(np.count_nonzero(targets[:-1] != datum.model_input[1:]))
    if differing:
        notes.append(f"{differing} targets are not the next input token; shown are the targets.")
    per_token = {name: v for name, v in inputs.items() if np.shape(v) == shape}
    columns: dict[str, Numbers] = {}
    for name, column in ((WEIGHTS, WEIGHT), (ADVANTAGES, ADVANTAGE), (LOGPROBS, SAMPLED)):
        if name in per_token:
            columns[column] = [None, *_numbers(per_token.pop(name))]
    if trained is not None and trained.shape == shape:
        columns[TRAINED] = [None, *_numbers(trained)]
        if SAMPLED in columns:
            with np.errstate(all="ignore"):
                ratio = np.exp(trained.astype(np.float64) - np.asarray(inputs[LOGPROBS]))
            columns[RATIO] = [None, *_numbers(ratio)]
    columns |= {name: [None, *_numbers(values)] for name, values in per_token.items()}
    ids = [*first, *targets.tolist()]
    return _cut(
        TokenView(
            ids=ids,
            texts=_texts(ids, table, notes),
            columns=columns,
            prompt_length=_prompt_length(columns, len(ids)),
            notes=notes,
        )
    )


def _conversation_view(conversation: Conversation, trained: NDArray[Any] | None) -> TokenView:
    notes = ["The client sent text; the worker made it into tokens with the model's chat template."]
    if trained is not None:
        notes.append(
            f"{trained.size:,} tokens, whose mean log-probability is {trained.mean():.4g}."
        )
    return TokenView(messages=_messages(conversation), notes=notes, images=_images(conversation))


def _prompt_length(columns: Mapping[str, Numbers], length: int) -> int:
    """Tokens before the first that was trained, or sampled with advantage 0."""
    factors = [columns[name] for name in (WEIGHT, ADVANTAGE, SAMPLED) if name in columns]
    rows = enumerate(zip(*factors, strict=True))
    return next((index for index, values in rows if any(values)), length if factors else 0)


def _cut(view: TokenView) -> TokenView:
    """At most ``MAX_TOKENS`` tokens, with a note of the others."""
    left_out = len(view.ids) - MAX_TOKENS
    if left_out <= 0:
        return view
    return replace(
        view,
        ids=view.ids[:MAX_TOKENS],
        texts=view.texts[:MAX_TOKENS],
        columns={name: values[:MAX_TOKENS] for name, values in view.columns.items()},
        top=view.top[:MAX_TOKENS],
        prompt_length=min(view.prompt_length, MAX_TOKENS),
        notes=[*view.notes, f"The last {left_out:,} tokens are left out."],
    )


def _texts(ids: Sequence[int], table: TokenTable | None, notes: list[str]) -> list[str]:
    if table is not None:
        return table.pieces(ids)
    notes.append("The worker has not stored this model's tokens yet: shown are their ids.")
    return [f"{id_} " for id_ in ids]


def _messages(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, _text_of(message)) for message in conversation.messages]


def _text_of(message: Message) -> str:
    """A message's text, with a mark at each image."""
    if isinstance(message.content, tuple):
        return "".join("[image]" if isinstance(p, Image) else p for p in message.content)
    return message.content or ""


def _images(conversation: Conversation) -> list[Image]:
    return [image for message in conversation.messages for image in message.images]


def _numbers(values: Any) -> Numbers:
    """Numbers for JSON: four digits, None for those that are not finite."""
    array = np.asarray(values, np.float64)
    return [
        float(f"{value:.4g}") if is_finite else None
        for value, is_finite in zip(array.tolist(), np.isfinite(array).tolist(), strict=True)
    ]
