"""JSON is refused for its depth and its number of values before it is decoded, and only then."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinkerapi.api.bodies import json_limits
from tinkerapi.api.bodies.json_limits import MAX_CONTAINERS, MAX_DEPTH, MAX_VALUES, check_json_size
from training.errors import LimitExceeded

TEXTS = st.text(st.sampled_from('[]{}",:\\/ \n\u00e9\u4e2d\U0001f600'), max_size=12)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.integers(), TEXTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=40,
)


def depth(value: Any) -> int:
    """Lists and objects inside each other, counted on the decoded value."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return 0
    return 1 + max(map(depth, value), default=0)


def containers(value: Any) -> int:
    items = list(value.values()) if isinstance(value, dict) else value
    return 1 + sum(map(containers, items)) if isinstance(items, list) else 0


def scanned(body: bytes, monkeypatch: pytest.MonkeyPatch, **limits: int) -> bool:
    """Whether the body passes under these limits."""
    with monkeypatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(json_limits, name, value)
        try:
            check_json_size(body)
        except LimitExceeded:
            return False
        return True


@pytest.mark.parametrize("escape", [True, False])
@pytest.mark.parametrize("piece_bytes", [1, 5, 2**18])
@settings(max_examples=40)
@given(value=VALUES)
def test_depth_and_containers_are_those_of_the_decoded_value(
    value: Any, piece_bytes: int, escape: bool
) -> None:
    body = json.dumps(value, ensure_ascii=escape).encode()
    for limit, name in ((depth(value), "MAX_DEPTH"), (containers(value), "MAX_CONTAINERS")):
        with pytest.MonkeyPatch.context() as patch:
            most = {"MAX_DEPTH": 10**6, "MAX_CONTAINERS": 10**6, "_PIECE_BYTES": piece_bytes}
            # With a limit of values below the body's length, every body is scanned.
            assert scanned(body, patch, **{**most, "MAX_VALUES": 1000, name: max(limit, 0)})
            if limit:
                small = {**most, "MAX_VALUES": len(body) - 1, name: limit - 1}
                if name == "MAX_CONTAINERS" or body.count(b"[") + body.count(b"{"):
                    assert not scanned(body, patch, **small)


@settings(max_examples=50)
@given(value=st.lists(st.one_of(st.integers(), TEXTS), min_size=2, max_size=30))
def test_commas_in_texts_are_no_values(value: list[Any]) -> None:
    body = json.dumps(value).encode()
    with pytest.MonkeyPatch.context() as patch:
        assert scanned(body, patch, MAX_VALUES=len(value) - 1)
        assert not scanned(body, patch, MAX_VALUES=len(value) - 2)


def test_the_limits_are_met_exactly() -> None:
    check_json_size(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    with pytest.raises(LimitExceeded, match=f"more than {MAX_DEPTH} deep"):
        check_json_size(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1))
    inner = b"[]," * (MAX_CONTAINERS - 2) + b"[]"
    check_json_size(b"[" + inner + b"]")
    with pytest.raises(LimitExceeded, match=f"more than {MAX_CONTAINERS} lists"):
        check_json_size(b"[" + inner + b",[]]")


def test_a_body_of_a_million_numbers_passes() -> None:
    datum = {"model_input": list(range(1000)), "loss_fn_inputs": {"weights": [1.0] * 1000}}
    body = orjson.dumps({"model_id": "m", "data": [datum] * 500})

    check_json_size(body)

    assert body.count(b",") >= 10**6


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":[' + b"[]," * 2**21 + b"[]]}",
        b'{"a":[' + b'{"a":0},' * 2**21 + b"0]}",
        b"[" + b"1," * (MAX_VALUES + 1) + b"1]",
        b"[" + b'"",' * (MAX_VALUES + 1) + b'""]',
        b'["\\\\",' + b"[]," * 2**21 + b"[]]",
        b"[" * 2**20,
    ],
)
def test_small_texts_of_many_objects_are_refused(body: bytes) -> None:
    with pytest.raises(LimitExceeded, match="this server's limit"):
        check_json_size(body)


@pytest.mark.parametrize("filling", [b"[", b",", b"\\\\", b'\\"', b"{"])
def test_a_long_text_may_hold_anything(filling: bytes) -> None:
    check_json_size(b'{"prompt": "' + filling * 2**23 + b'"}')


@given(body=st.binary(max_size=60), piece_bytes=st.sampled_from([1, 3, 2**18]))
def test_what_is_no_json_is_left_to_the_decoder(body: bytes, piece_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_limits, "_PIECE_BYTES", piece_bytes)
        patch.setattr(json_limits, "MAX_VALUES", 50)
        try:
            check_json_size(body)
        except LimitExceeded:
            assert len(body) > MAX_DEPTH
