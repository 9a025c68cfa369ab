"""Previews of payloads are short and bounded for every payload."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from futures.payload import encode
from tinkerapi.console.kit import preview

values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats()
    | st.text()
    | st.builds(lambda length: np.arange(length, dtype=np.float32), st.integers(0, 2000)),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
)

MAX_TEXT = (preview.MAX_LINES + 1) * 20 * (preview.MAX_CHARACTERS + 40)


@given(values)
def test_any_payload_has_a_preview_of_bounded_size(value: Any) -> None:
    text = preview.body_preview(encode(value))
    assert len(text.split("\n")) <= preview.MAX_LINES + 1
    assert len(text) <= MAX_TEXT


@pytest.mark.parametrize(
    "value",
    [
        {"data": [{"model_input": np.zeros(100_000, np.int32)} for _ in range(50)]},
        {"text": "x" * 10_000_000},
        {f"key {number}": number for number in range(10_000)},
        [[0] * 1000 for _ in range(1000)],
        ["word" * 10_000] * 1000,
    ],
)
def test_large_payloads_have_small_previews(value: Any) -> None:
    text = preview.body_preview(encode(value))
    assert 0 < len(text) < 10_000
    assert "more" in text


def test_a_preview_says_what_a_request_holds() -> None:
    body = encode(
        {
            "data": [{"messages": [["user", "hi\nthere"]]}] * 6,
            "loss_fn": "cross_entropy",
            "weights": np.array([[0.5, 1.0], [2.0, 3.0]], np.float32),
        }
    )
    assert preview.body_preview(body).split("\n") == [
        "data  6 items",
        *[
            line
            for index in range(preview.MAX_ITEMS)
            for line in (f"  [{index}]", "    messages  1 items", '      [0]  ["user", "hi⏎there"]')
        ],
        "  … 2 more",
        'loss_fn  "cross_entropy"',
        "weights  float32 2x2  [0.5, 1, 2, 3]",
    ]


def test_what_is_no_payload_is_said_to_be_unreadable() -> None:
    assert preview.body_preview(b"junk").startswith("cannot be read")


def test_a_payload_beyond_the_limit_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "MAX_BYTES", 1024 * 1024)
    body = encode({"text": "x" * (2 * 1024 * 1024)})
    assert preview.body_preview(body) == "larger than 1 MiB: not shown"
