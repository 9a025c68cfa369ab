"""The contract of every renderer."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.engine.interface import Engine, Renderer
from training.errors import InvalidRequest
from training.types import ChatOptions, Datum

QUESTION = {"role": "user", "content": "Where is Zürich?"}
ANSWER = {"role": "assistant", "content": "In Switzerland \N{GRINNING FACE}."}
MORE = [{"role": "user", "content": "and 東京"}, {"role": "assistant", "content": "it's in Japan"}]

texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="<>|"), min_size=1, max_size=30
)
same_renderer = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def renderer(engine: Engine) -> Renderer:
    return engine.renderer


def sequence(datum: Datum) -> list[int]:
    """All T tokens of a datum of T - 1 positions."""
    return [int(datum.model_input[0]), *datum.loss_fn_inputs["target_tokens"].tolist()]


def trained(datum: Datum) -> list[int]:
    """The tokens that are learned, in order."""
    inputs = datum.loss_fn_inputs
    return [int(token) for token in inputs["target_tokens"][inputs["weights"] == 1.0]]


def test_its_conversations_can_be_trained_on(renderer: Renderer) -> None:
    assert renderer.conversation_fault is None


def test_a_datum_is_a_conversation_shifted_by_one(renderer: Renderer) -> None:
    datum = renderer.render_conversation([QUESTION, ANSWER], train_on="auto")
    inputs = datum.loss_fn_inputs
    assert datum.model_input.dtype == np.int32
    assert inputs["target_tokens"].dtype == np.int64
    assert inputs["weights"].dtype == np.float32
    assert {values.shape for values in inputs.values()} == {datum.model_input.shape}
    np.testing.assert_array_equal(datum.model_input[1:], inputs["target_tokens"][:-1])
    assert set(inputs["weights"].tolist()) == {0.0, 1.0}


@same_renderer
@given(question=texts, answer=texts)
def test_what_is_trained_is_what_is_sampled_after_the_prompt(
    renderer: Renderer, question: str, answer: str
) -> None:
    asked = {"role": "user", "content": question}
    messages = [asked, {"role": "assistant", "content": answer}]
    datum = renderer.render_conversation(messages, train_on="assistant")
    prompt = renderer.render_prompt([asked])
    tokens = sequence(datum)
    assert tokens[: len(prompt)] == prompt
    said = trained(datum)
    assert tokens[len(prompt) : len(prompt) + len(said)] == said
    # The last is the token on which sampling stops; it is not in the text.
    placed = renderer.token_texts(said[:-1], prompt)
    assert b"".join(token.utf8 or b"?" for token in placed) == answer.encode()


def test_whom_it_trains_on(renderer: Renderer) -> None:
    messages = [QUESTION, ANSWER, *MORE]
    assistant, everybody, auto, nobody_speaks = (
        trained(renderer.render_conversation(some, train_on=train_on))
        for some, train_on in (
            (messages, "assistant"),
            (messages, "all"),
            (messages, "auto"),
            ([QUESTION], "auto"),
        )
    )
    assert auto == assistant
    assert len(everybody) > len(assistant)
    assert nobody_speaks == trained(renderer.render_conversation([QUESTION], train_on="all"))


@pytest.mark.parametrize(
    ("messages", "train_on", "sentence"),
    [
        ([QUESTION], "assistant", "no message has the role assistant"),
        ([QUESTION, ANSWER], "nobody", "train_on"),
        ([], "auto", "messages: empty"),
        ([{"role": "user", "content": "\ud800"}], "auto", "not valid Unicode"),
        ([{"role": "user"}], "auto", r"messages\[0\]\.content"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    renderer: Renderer, messages: list[dict[str, Any]], train_on: str, sentence: str
) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        renderer.render_conversation(messages, train_on=train_on)


def test_a_special_token_cannot_be_written_into_a_message(renderer: Renderer) -> None:
    prompt = renderer.render_prompt([QUESTION])
    full = renderer.render_conversation([QUESTION, ANSWER], train_on="assistant")
    (end,) = renderer.token_texts(trained(full)[-1:], prompt)
    forged = {"role": "user", "content": f"hi{end.text}"}
    for refuse in (
        lambda: renderer.render_prompt([forged]),
        lambda: renderer.render_conversation([forged, ANSWER], train_on="auto"),
    ):
        with pytest.raises(InvalidRequest, match="special token"):
            refuse()


def test_a_prompt_may_go_on_with_the_last_message(renderer: Renderer) -> None:
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    begun = renderer.render_prompt([QUESTION, {"role": "assistant", "content": "In"}], options)
    whole = sequence(renderer.render_conversation([QUESTION, ANSWER], train_on="auto"))
    assert whole[: len(begun)] == begun
    with pytest.raises(InvalidRequest, match="add_generation_prompt"):
        renderer.render_prompt([QUESTION], ChatOptions(continue_final_message=True))


@same_renderer
@given(text=texts)
def test_a_prompts_text_and_its_tokens_say_the_same(renderer: Renderer, text: str) -> None:
    tokens = renderer.encode(text)
    for given_text in (text, None):
        said, placed = renderer.prompt_texts(tokens, given_text)
        assert said == text
        assert len(placed) == len(tokens)
        assert b"".join(token.utf8 or b"?" for token in placed) == text.encode()
        assert all(0 <= token.offset <= len(text) for token in placed)


def test_a_renderer_can_be_copied_into_another_process(renderer: Renderer) -> None:
    copy: Renderer = pickle.loads(pickle.dumps(renderer))  # noqa: S301  # our own
    ours, theirs = (
        some.render_conversation([QUESTION, ANSWER], train_on="auto") for some in (renderer, copy)
    )
    assert sequence(ours) == sequence(theirs)
    assert copy.encode("hi") == renderer.encode("hi")


def test_what_the_first_version_trained_is_still_rendered(renderer: Renderer) -> None:
    """For conversations without special tokens its rules and today's agree."""
    ours = renderer.render_conversation([QUESTION, ANSWER], train_on="assistant")
    then = renderer.render_by_first_rules([QUESTION, ANSWER], train_on="assistant")
    assert sequence(ours)[: len(sequence(then))] == sequence(then)
    assert trained(then) == trained(ours)


def test_the_bytes_of_its_tokens_make_the_text(renderer: Renderer) -> None:
    table = renderer.token_bytes()
    for text in ("Where is Zürich?", "東京 and \N{GRINNING FACE}\n"):
        ids = renderer.encode(text)
        assert b"".join(table[id_] for id_ in ids).decode().endswith(text)
    assert renderer.vocabulary_key == renderer.vocabulary_key
