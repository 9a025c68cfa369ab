"""Echo: a choice begins with its prompt, whose tokens have log-probabilities; harnesses need it."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest

from tests.openai.test_completions import complete

UNIFORM = -math.log(257)  # the fake engine's log-probability of every token


def lm_eval_score(choice: Any, context_tokens: int) -> tuple[float, bool]:
    """The values that lm-eval's local-completions reads from an answer to echo with max_tokens
    1."""
    values = choice.logprobs.token_logprobs[context_tokens:-1]
    tops = choice.logprobs.top_logprobs[context_tokens:-1]
    is_greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
    return sum(values), is_greedy


@pytest.mark.parametrize("prompt", ["hello", [*b"hello"]])
def test_a_choice_begins_with_its_prompt(user, prompt):
    plain = complete(user, prompt=prompt, max_tokens=7, logprobs=2).choices[0]
    [echoed] = complete(user, prompt=prompt, max_tokens=7, logprobs=2, echo=True).choices

    assert echoed.text == "hello" + plain.text
    ours, theirs = echoed.logprobs, plain.logprobs
    assert ours.tokens == [*"hello", *theirs.tokens]
    assert ours.token_logprobs == [None, *[pytest.approx(UNIFORM)] * 4, *theirs.token_logprobs]
    assert ours.text_offset == [*range(5), *(5 + offset for offset in theirs.text_offset)]
    assert ours.top_logprobs[0] is None
    assert set(ours.top_logprobs[1]) == {"\x00", "\x01", "e"}
    assert ours.top_logprobs[5:] == theirs.top_logprobs


def test_without_a_token_to_sample_only_the_prompt_is_scored(user):
    answer = complete(user, prompt="hello", max_tokens=0, logprobs=0, echo=True)

    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == ("hello", "length")
    assert choice.logprobs.tokens == [*"hello"]
    assert choice.logprobs.token_logprobs == [None, *[pytest.approx(UNIFORM)] * 4]
    assert answer.usage.completion_tokens == 0
    assert complete(user, prompt="hello", max_tokens=0).choices[0].text == ""


def test_a_batch_as_lm_eval_sends_it(user):
    prompts = [[*b"the sky is blue"], [*b"one"], [*b"two and two are four"]]
    answer = complete(user, prompt=prompts, max_tokens=1, temperature=0, logprobs=1, echo=True)

    for prompt, choice in zip(prompts, answer.choices, strict=True):
        assert choice.text.startswith(bytes(prompt).decode())
        assert len(choice.logprobs.tokens) == len(prompt) + 1
        score, is_greedy = lm_eval_score(choice, context_tokens=2)
        assert score == pytest.approx(UNIFORM * (len(prompt) - 2))
        assert is_greedy  # every token is as likely as any other


def test_every_choice_of_a_prompt_has_it(user):
    texts = [c.text for c in complete(user, prompt=["a", "bc"], n=2, echo=True).choices]
    plain = [c.text for c in complete(user, prompt=["a", "bc"], n=2).choices]
    assert texts == ["a" + plain[0], "a" + plain[1], "bc" + plain[2], "bc" + plain[3]]


def test_tokens_that_are_parts_of_characters_add_up_to_the_text(user):
    text = "é€😀"
    [choice] = complete(user, prompt=text, max_tokens=0, logprobs=0, echo=True).choices
    tokens = [*text.encode(), 256]
    [same] = complete(user, prompt=tokens, max_tokens=0, logprobs=0, echo=True).choices

    assert choice.text == text
    assert choice.logprobs.tokens == ["\ufffd"] * 9
    assert choice.logprobs.text_offset == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert same.text == text + "<end>"  # special tokens are written out
    assert same.logprobs.text_offset == [*choice.logprobs.text_offset, 3]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "echo"),
        ({"prompt": [[7] * 500] * 20, "n": 12, "logprobs": 20}, "echo"),
    ],
)
def test_what_cannot_be_echoed_is_refused_by_name(user, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        complete(user, **{"prompt": "hello", "echo": True, **fields})
    assert refused.value.param == param
