"""The official openai client against a whole server with the real default model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.acceptance.official_sdk import api_key
from tests.server import Server

pytestmark = pytest.mark.acceptance

SECRET: list[Any] = [
    {"role": "user", "content": "What is the secret word?"},
    {"role": "assistant", "content": "The secret word is pineapple."},
]
STORY: list[Any] = [{"role": "user", "content": "Tell me a story about a small boat. 🚣"}]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=api_key(server), max_retries=0
    ) as client:
        yield client


def test_text_streams_while_it_is_sampled_and_is_that_of_the_whole_answer(
    server: Server, client: openai.OpenAI
) -> None:
    model = client.models.list().data[0].id
    fields: dict[str, Any] = {"model": model, "messages": STORY, "seed": 4, "max_tokens": 80}
    whole = client.chat.completions.create(**fields)

    pieces = []
    for chunk in client.chat.completions.create(**fields, stream=True):
        if not pieces:
            # It was not finished when its first words were here.
            asked = server.post("/retrieve_future", request_id=chunk.id)
            assert asked.status_code == 202
        pieces.append(chunk.choices[0].delta.content or "")

    assert len(pieces) > 3
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens > 10


def test_a_client_that_leaves_its_stream_cancels_the_sample(
    server: Server, client: openai.OpenAI
) -> None:
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model, messages=STORY, seed=5, max_tokens=200, stream=True
    )
    first = next(iter(stream))
    stream.close()

    result = server.retrieve(first.id)
    assert first.choices[0].delta.content
    assert result.status_code == 409
    assert result.json()["error_code"] == "FutureCancelled"


def test_a_trained_model_is_sampled_by_its_path(server: Server, client: openai.OpenAI) -> None:
    for _ in range(8):
        server.post(
            "/api/v1/forward_backward", model_id="openai", data=[SECRET], loss_fn="cross_entropy"
        )
        server.post("/api/v1/optim_step", model_id="openai", adam_params={"learning_rate": 1e-3})
    path = server.post("/api/v1/save_weights_for_sampler", model_id="openai", name="taught").json()
    fields: dict[str, Any] = {"messages": SECRET[:1], "temperature": 0, "max_tokens": 12}

    answer = client.chat.completions.create(
        model=path["path"], logprobs=True, top_logprobs=2, **fields
    )

    [choice] = answer.choices
    assert choice.message.content == "The secret word is pineapple."
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    *said, end = choice.logprobs.content
    assert "".join(item.token for item in said) == choice.message.content
    assert (end.token, end.bytes) == ("<|im_end|>", list(b"<|im_end|>"))
    for item in said:
        assert [item.top_logprobs[0].token, item.top_logprobs[0].logprob] == [
            item.token,
            pytest.approx(item.logprob, abs=1e-4),
        ]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=path["path"] + "x", **fields)
