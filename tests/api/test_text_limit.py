"""Text that must exceed the token limit is refused before it is tokenized, in every dialect."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import ApiClient
from tinkerapi.api.fields.prompts import CHARACTERS_PER_TOKEN

MOST = 10 * CHARACTERS_PER_TOKEN
LONG = "x" * (MOST + 1)
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("/api/v1/asample", {"base_model": MODEL, "prompt": LONG}, "prompt"),
    ("/api/v1/asample", {"base_model": MODEL, "prompts": ["a", LONG]}, "prompts[1]"),
    ("/api/v1/asample", {"base_model": MODEL, "messages": said(LONG)}, "messages"),
    (
        "/api/v1/asample",
        {"base_model": MODEL, "messages": said("x" * MOST) + said("y")},
        "messages",
    ),
    (
        "/fwdbwd",
        {"model_id": "m", "data": [said("a"), said(LONG)], "loss_fn": "cross_entropy"},
        "data[1]",
    ),
    ("/v1/completions", {"model": MODEL, "prompt": LONG}, "prompt"),
    ("/v1/completions", {"model": MODEL, "prompt": ["a", LONG]}, "prompt[1]"),
    ("/v1/chat/completions", {"model": MODEL, "messages": said(LONG)}, "messages"),
    (
        "/v1/chat/completions",
        {
            "model": MODEL,
            "messages": said("a"),
            "tools": [{"type": "function", "function": {"name": "f", "description": LONG}}],
        },
        "tools",
    ),
]


@pytest.mark.parametrize(("path", "body", "where"), CASES)
def test_too_much_text_is_refused_by_its_place_with_the_limit(
    api: ApiClient, settings: Any, path: str, body: dict[str, Any], where: str
) -> None:
    settings.MAX_DATUM_TOKENS = 10
    answer = api.post(path, **body)
    assert answer.status_code == 400
    assert f"{where}: " in answer.content.decode()
    assert f"this server takes {MOST} in one sequence" in answer.content.decode()


def test_as_much_as_is_allowed_is_taken(api: ApiClient, settings: Any) -> None:
    settings.MAX_DATUM_TOKENS = 10
    answer = api.post("/api/v1/asample", base_model=MODEL, prompt="x" * MOST)
    assert answer.status_code == 200
