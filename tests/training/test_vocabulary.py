"""Tokens as text without a tokenizer."""

from __future__ import annotations

import pytest

from training.models import Vocabulary
from training.vocabulary import TokenTable, vocabulary_find, vocabulary_store

FACE = "\N{GRINNING FACE}".encode()


def test_a_character_of_several_tokens_is_in_the_last_of_them() -> None:
    table = TokenTable("", [b"a", FACE[:1], FACE[1:3], FACE[3:], b"z"])
    assert table.pieces([0, 1, 2, 3, 4]) == ["a", "", "", "\N{GRINNING FACE}", "z"]
    assert table.text([0, 1, 2, 3, 4]) == "a\N{GRINNING FACE}z"


def test_what_is_no_character_is_shown_as_one_that_is_missing() -> None:
    table = TokenTable("", [b"a", FACE[:2], b"\xff"])
    assert table.pieces([0, 1]) == ["a", "\ufffd"]
    assert table.pieces([1, 0, 2]) == ["", "\ufffda", "\ufffd"]
    assert table.pieces([7, -1, 0]) == ["", "", "a"]
    assert table.pieces([]) == []


@pytest.mark.django_db
def test_a_table_is_made_once_and_again_if_the_tokens_change() -> None:
    made = []

    def make() -> list[bytes]:
        made.append(1)
        return [b"a", b"\xff"]

    assert vocabulary_find("engine") is None
    for key in ("k1", "k1", "k2"):
        vocabulary_store("engine", key, make)
    assert len(made) == 2
    found = vocabulary_find("engine")
    assert found is not None
    assert (found.key, list(found.tokens)) == ("k2", [b"a", b"\xff"])
    assert Vocabulary.objects.count() == 1
