"""Short texts become tokens in the worker: only those that are quick, and nobody waits for them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from training.engine.fake.renderer import FakeRenderer
from training.engine.interface import Renderer
from training.errors import InvalidRequest
from training.kinds import ForwardBackward, Sample
from training.types import (
    NO_CHAT_OPTIONS,
    ChatOptions,
    Conversation,
    Message,
    Prompt,
    SamplingParams,
)
from training.worker import short_texts
from training.worker.short_texts import CHARACTERS, MESSAGES, ShortTexts
from training.worker.text_work import tokens_of

ASKED = Conversation((Message("user", "hi"), Message("assistant", "ho")))
ADA, EVE = 1, 2


def sample(*prompts: Prompt) -> Sample:
    return Sample(prompts=prompts, num_samples=1, sampling_params=SamplingParams(seed=1))


def train(*conversations: Conversation) -> ForwardBackward:
    return ForwardBackward(data=conversations, loss_fn="cross_entropy", loss_fn_config={})


def short(renderer: Renderer | None = None) -> ShortTexts:
    made = ShortTexts(renderer or FakeRenderer(), max_context_tokens=10_000)
    made.begin_turn()
    return made


class Odd(FakeRenderer):
    """A text that begins with "busy" takes long, and one with "refuse" is refused."""

    def encode(self, text: str) -> list[int]:
        if text.startswith("busy"):
            until = time.thread_time() + 20.0
            while time.thread_time() < until:
                with suppress(Exception):  # as a template's own error handling
                    sum(range(1000))
        if text.startswith("refuse "):
            raise InvalidRequest(f"prompt: {text.removeprefix('refuse ')}")
        return super().encode(text)

    def render_prompt(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions = NO_CHAT_OPTIONS
    ) -> list[int]:
        return self.encode(str(messages[0]["content"]))


@pytest.mark.parametrize(
    "request_",
    [sample("hi", "ho"), sample(ASKED), sample("hi", np.array([1, 2], np.int32)), train(ASKED)],
    ids=["texts", "conversation", "text and tokens", "training"],
)
def test_tokens_made_here_are_those_of_the_process(request_: Sample | ForwardBackward) -> None:
    made = short().tokens(ADA, request_)
    assert isinstance(made, list)
    expected = tokens_of(FakeRenderer(), request_, max_context_tokens=10_000)
    for one, other in zip(made, expected, strict=True):
        assert _ids(one) == _ids(other)


def _ids(item: Any) -> list[int]:
    ids = item.tokens if hasattr(item, "tokens") else item.model_input
    return [int(token) for token in ids]


@pytest.mark.parametrize(
    "request_",
    [
        sample("x" * (CHARACTERS + 1)),
        sample("x" * CHARACTERS, "x"),
        sample(Conversation((Message("user", "hi"),) * (MESSAGES + 1))),
        sample(Conversation((Message("user", "hi"),), ChatOptions(template_kwargs={"n": 10**9}))),
        sample(Conversation((Message("user", "hi", name="x" * 10**6),))),
        train(Conversation((Message("assistant", None, tool_calls=({"id": "1"},)),))),
    ],
    ids=["long", "long together", "messages", "options", "name", "tools"],
)
def test_everything_else_goes_to_the_process(request_: Sample | ForwardBackward) -> None:
    assert short().tokens(ADA, request_) is None


def test_a_refusal_is_the_answer() -> None:
    refused = short(Odd()).tokens(ADA, sample("hi", "refuse this"))
    assert isinstance(refused, InvalidRequest)
    assert str(refused) == "prompt[1]: this"


@pytest.mark.parametrize("prompt", ["busy", Conversation((Message("user", "busy"),))])
def test_what_takes_long_is_interrupted_and_so_is_never_its_owner_again(prompt: Prompt) -> None:
    texts = short(Odd())
    begin = time.thread_time()
    assert texts.tokens(EVE, sample(prompt)) is None
    assert time.thread_time() - begin < 10.0, "it was interrupted"
    texts.begin_turn()
    assert texts.tokens(EVE, sample("hi")) is None
    assert texts.tokens(ADA, sample("hi")) is not None


def test_the_texts_of_one_claim_take_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = short()
    monkeypatch.setattr(short_texts, "TURN_SECONDS", -1.0)
    texts.begin_turn()
    assert texts.tokens(ADA, sample("hi")) is None
    monkeypatch.undo()
    texts.begin_turn()
    assert texts.tokens(ADA, sample("hi")) is not None


def test_no_text_of_a_slow_tokenizer_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_texts, "TRY_SECONDS", 0.0)
    texts = short()
    assert texts.tokens(ADA, sample("hi")) is None
    assert texts.tokens(ADA, train(ASKED)) is None


def test_no_conversation_of_a_template_that_could_take_all_memory_is_short() -> None:
    renderer = FakeRenderer()
    renderer.has_plain_template = False
    texts = short(renderer)
    assert texts.tokens(ADA, sample(ASKED)) is None
    assert texts.tokens(ADA, sample("hi")) is not None
