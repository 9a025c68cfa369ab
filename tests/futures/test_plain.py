"""Every value of a client can be stored, and shown afterwards."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from futures.claiming import future_claim
from futures.models import Future, Worker
from futures.plain import MAX_TEXT, plain_json, plain_text
from futures.services import Refusal
from tests.futures.conftest import SubmitFactory, finish

TEXTS = ["\0", "a\0b", "\ud800", "\udfff\ud800", "\x1b[31mred", "\u202eevil", "\x7f", "x" * 9999]

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**310), 10**310)
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=10,
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_utf8_without_what_nobody_should_be_shown_and_not_long(text: str) -> None:
    plain = plain_text(text)

    assert plain.encode().decode().isprintable()
    assert 0 < len(plain) <= MAX_TEXT + 3


def test_an_ordinary_text_is_left_alone() -> None:
    text = 'data[0]: "größer" 👩‍🔬\n\tnext line, \\u0000 as its author wrote it'

    assert plain_text(text) == text


def test_a_long_text_keeps_both_ends() -> None:
    assert plain_text("begin" + "-" * 9999 + "end", 20) == "begin----- … -------end"


@settings(max_examples=300, derandomize=True)
@given(value=JSON)
def test_any_json_value_has_a_form_that_json_can_say(value: Any) -> None:
    said = orjson.dumps(plain_json(value))

    assert b"\\u0000" not in said.replace(b"\\\\", b"")


def test_nesting_ends_somewhere() -> None:
    value: Any = 1
    for _ in range(300):
        value = {"a": [value]}

    assert json.dumps(plain_json(value, depth=4)) == '{"a": [{"a": ["\\u2026"]}]}'


SUMMARIES = [
    *({"k": text} for text in TEXTS),
    {"\0": 1},
    {"k": "\\u0000"},
    *({"k": number} for number in (float("nan"), 2**64, 10**400, 1e308)),
]


@pytest.mark.django_db
@pytest.mark.parametrize("summary", SUMMARIES)
def test_any_summary_can_be_stored_and_shown_again(
    submit: SubmitFactory, worker: Worker, summary: dict[str, Any]
) -> None:
    submitted, finished = submit(summary=summary), submit()
    future_claim(worker=worker, max_futures=10, max_cost=10)
    finish(worker, finished, result=b"1", summary=summary)

    for future in (submitted, finished):
        stored = Future.objects.get(pk=future.pk)
        assert orjson.dumps(plain_json(stored.summary)) != b"{}"
        assert stored.summary_line


@pytest.mark.django_db
@pytest.mark.parametrize("text", TEXTS)
def test_any_error_can_be_stored(submit: SubmitFactory, worker: Worker, text: str) -> None:
    refused, failed = submit(refusal=Refusal(error=text)), submit()
    future_claim(worker=worker, max_futures=10, max_cost=10)
    finish(worker, failed, error=text, category="user")

    for future in (refused, failed):
        assert Future.objects.get(pk=future.pk).error == plain_text(text)
