"""Images in chats of OpenAI's client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from futures.models import Future
from futures.payload import decode
from tests.openai.conftest import OpenAIUser
from tests.openai.test_completions import HELLO, chat
from tests.pictures import address, bomb, picture


def look(url: str, **more: Any) -> list[dict[str, Any]]:
    part = {"type": "image_url", "image_url": {"url": url, **more}}
    return [{"role": "user", "content": [{"type": "text", "text": "look"}, part]}]


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("https://x.example/cat.png", "this server fetches no image from an address"),
        (address(bomb()), "30000 x 30000 pixels; this server takes 16777216 in one image"),
        (address(picture(), "webp"), "labelled webp, but it is a png file"),
    ],
)
def test_a_bad_image_is_refused_with_its_place_and_nothing_is_stored(
    user: OpenAIUser, url: str, sentence: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(user, messages=look(url))
    assert caught.value.param == "messages[0].content[1].image_url.url"
    assert sentence in caught.value.message
    assert not Future.objects.exists()


def test_an_image_reaches_the_model_which_refuses_it_if_it_reads_text_only(
    user: OpenAIUser,
) -> None:
    data = picture()
    with pytest.raises(openai.BadRequestError, match="this base model reads text only"):
        chat(user, messages=look(address(data), detail="high"))
    stored = decode(bytes(Future.objects.get().payload))["prompts"][0]["messages"][0]
    assert stored["content"] == ["look", {"data": data, "format": "png"}]
    assert chat(user, messages=HELLO).choices
