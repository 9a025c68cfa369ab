"""Training examples of every form as tokens for people."""

from __future__ import annotations

import numpy as np
import pytest

from training import token_view
from training.images import Chunks, Image
from training.token_view import (
    ADVANTAGE,
    RATIO,
    SAMPLED,
    TRAINED,
    WEIGHT,
    TokenView,
    example_view,
)
from training.types import Conversation, Datum, Example, ImageDatum, Message
from training.vocabulary import TokenTable

TABLE = TokenTable("", [bytes([65 + id_]) for id_ in range(26)])
PNG = Image(data=b"\x89PNG", format="png", expected_tokens=2)


def view(item: Example, trained: object = None) -> TokenView:
    numbers = None if trained is None else np.asarray(trained, np.float32)
    return example_view(item, numbers, TABLE)


def test_a_target_stands_at_the_token_that_it_predicts() -> None:
    datum = Datum(
        model_input=np.array([0, 1, 2], np.int32),
        loss_fn_inputs={
            "target_tokens": np.array([1, 2, 3]),
            "weights": np.array([0, 1, 0.5], np.float32),
        },
    )
    found = view(datum, [-1.0, -2.0, -np.inf])
    assert "".join(found.texts) == "ABCD"
    assert found.columns == {WEIGHT: [None, 0, 1, 0.5], TRAINED: [None, -1, -2, None]}
    assert found.prompt_length == 2
    assert found.notes == []


def test_a_policys_datum_has_its_ratio_and_inputs_of_any_name() -> None:
    inputs = {
        "target_tokens": np.array([1, 2]),
        "logprobs": np.array([0, -1], np.float32),
        "advantages": np.array([0, 0], np.float32),
        "mask": np.array([0, 1], np.float32),
    }
    found = view(Datum(model_input=np.array([0, 1], np.int32), loss_fn_inputs=inputs), [0.0, -1.5])
    assert found.columns[RATIO] == [None, 1.0, pytest.approx(np.exp(-0.5), rel=1e-3)]
    assert found.columns[SAMPLED] == [None, 0, -1]
    assert found.columns[ADVANTAGE] == [None, 0, 0]
    assert found.columns["mask"] == [None, 0, 1]
    assert found.prompt_length == 2  # sampled, with advantage 0


def test_of_several_targets_the_heaviest_is_shown() -> None:
    datum = Datum(
        model_input=np.array([0, 1], np.int32),
        loss_fn_inputs={
            "target_tokens": np.array([[1, 5], [6, 2]]),
            "weights": np.array([[0.9, 0.1], [0.2, 0.8]], np.float32),
        },
    )
    found = view(datum, [[-1, -2], [-3, -4]])
    assert "".join(found.texts) == "ABC"
    assert found.columns == {WEIGHT: [None, 0.9, 0.8], TRAINED: [None, -1, -4]}
    assert "2 targets at each position" in found.notes[0]


def test_targets_that_are_not_the_next_token_are_pointed_out() -> None:
    datum = Datum(
        model_input=np.array([0, 1, 2], np.int32),
        loss_fn_inputs={"target_tokens": np.array([9, 2, 3])},
    )
    assert view(datum).notes == ["1 targets are not the next input token; shown are the targets."]


def test_an_images_tokens_have_places_and_the_image_is_kept() -> None:
    chunks = Chunks(chunks=(np.array([0], np.int32), PNG, np.array([3], np.int32)))
    targets = {"target_tokens": np.array([-1, -1, 3, 4]), "weights": np.ones(4, np.float32)}
    found = view(ImageDatum(model_input=chunks, loss_fn_inputs=targets), [-1, -1, -1, -1])
    assert found.texts == ["A", "", "", "D", "E"]
    assert list(found.images) == [PNG]
    assert found.columns[TRAINED] == [None, -1, -1, -1, -1]


def test_an_image_of_an_unknown_number_of_tokens_is_shown_without_them() -> None:
    chunks = Chunks(chunks=(Image(data=b"\x89PNG", format="png"),))
    found = view(ImageDatum(model_input=chunks, loss_fn_inputs={"target_tokens": np.array([1])}))
    assert found.ids == []
    assert len(found.images) == 1


def test_a_conversation_is_its_messages_with_marks_at_images() -> None:
    messages = (Message("user", ("see ", PNG)), Message("assistant", None))
    found = view(Conversation(messages), [-1.0, -3.0])
    assert found.messages == [("user", "see [image]"), ("assistant", "")]
    assert found.images == [PNG]
    assert "mean log-probability is -2" in found.notes[1]


def test_a_long_datum_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_view, "MAX_TOKENS", 3)
    datum = Datum(
        model_input=np.arange(9, dtype=np.int32),
        loss_fn_inputs={"target_tokens": np.arange(1, 10), "weights": np.ones(9, np.float32)},
    )
    found = view(datum)
    assert "".join(found.texts) == "ABC"
    assert len(found.columns[WEIGHT]) == 3
    assert found.notes == ["The last 7 tokens are left out."]


def test_without_a_table_ids_are_shown() -> None:
    datum = Datum(
        model_input=np.array([7], np.int32), loss_fn_inputs={"target_tokens": np.array([8])}
    )
    found = example_view(datum, None, None)
    assert found.texts == ["7 ", "8 "]
    assert "not stored this model's tokens" in found.notes[0]
