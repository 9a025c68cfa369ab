"""For every bad body, the answer is a 4xx in OpenAI's shape that names the field."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import ApiClient
from tests.openai.test_completions import HELLO, MODEL

ODD: list[Any] = [7, -1, 2**70, True, "x\0", [], [[]], [7], [{}], {}, {"a": None}, "", [None]]
FIELDS = {"chat/completions": {"messages": HELLO}, "completions": {"prompt": "hello"}}


@pytest.mark.parametrize("path", sorted(FIELDS))
def test_odd_values_are_refused_by_name(api: ApiClient, path: str) -> None:
    odd: list[tuple[str, Any]] = [("model", value) for value in ODD]
    odd += [("stop", v) for v in (7, True, [7], [[]], [""], {}, [None])]
    odd += [("stream_options", v) for v in (7, [], {"a": 1}, {"include_usage": 1})]
    odd += [("logit_bias", v) for v in (7, [1], {"1": 200}, {"x": 1}, "x")]
    odd += [(n, v) for n in ("n", "seed", "max_tokens") for v in (2**70, 1.5, "1", [], True)]
    if path == "completions":
        odd += [("prompt", v) for v in (7, True, [], [[]], [7.5], [7, "a"], {}, [{}], ["a", 7], "")]
    else:
        odd += [("messages", v) for v in (7, "hi", {}, [], [7], [{}], [{"role": "user"}])]
        odd += [
            ("messages", [{"role": "user", "content": content}])
            for content in (7, {}, [7], [{}], [{"type": "text"}], [{"type": "image_url"}])
        ]
    for name, value in odd:
        answer = api.post(f"/v1/{path}", **{"model": MODEL, **FIELDS[path], name: value})
        assert answer.status_code in (400, 404), (name, value, answer.content)
        error = answer.json()["error"]
        assert error["param"].startswith(name), (value, error)


@pytest.mark.parametrize("body", [b"[]", b"{", b'"x"', b"\xff", b"[1e999]"])
def test_what_is_no_json_object_is_refused(api: ApiClient, body: bytes) -> None:
    answer = api.client.post("/v1/completions", body, content_type="application/json")
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_wrong_method_is_refused_in_the_same_shape(api: ApiClient) -> None:
    answer = api.get("/v1/completions")
    assert answer.status_code == 405
    assert "POST" in answer.json()["error"]["message"]
