"""Which models a key may sample from, through the official client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.conftest import ApiClient
from tests.openai.conftest import OpenAIUser
from training.base_models import base_model_get

MODEL = base_model_get(None).name


def save_sampler(api: ApiClient, user: OpenAIUser, *, name: str = "first") -> str:
    """Train a step and save; the path."""
    headers = {"X-API-Key": user.key}
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for path, body in (
        ("forward_backward", {"data": [conversation], "loss_fn": "cross_entropy"}),
        ("optim_step", {"adam_params": {"learning_rate": 0.5}}),
        ("save_weights_for_sampler", {"name": name}),
    ):
        answer = api.post(f"/api/v1/{path}", headers=headers, model_id="mine", **body)
        assert answer.status_code == 200, answer.content
    return str(answer.json()["path"])


def ask(user: OpenAIUser, model: str) -> Any:
    return user(
        lambda client: client.completions.create(model=model, prompt="hello", seed=1, max_tokens=20)
    )


def test_a_sampler_path_is_a_model_of_its_owner_only(user, served_api):
    path = save_sampler(served_api, user)
    stranger = OpenAIUser("stranger")

    listed = user(lambda client: client.models.list()).data
    assert [model.id for model in listed] == [MODEL, path]
    assert [model.id for model in stranger(lambda client: client.models.list()).data] == [MODEL]
    for model in (MODEL, path):
        found = user(lambda client, name=model: client.models.retrieve(name))
        assert (found.id, found.object) == (model, "model")
    answer = ask(user, path)
    assert answer.model == path
    sample = served_api.post(
        "/api/v1/sample",
        headers={"X-API-Key": user.key},
        model_path=path,
        prompt="hello",
        sampling_params={"seed": 1, "max_tokens": 20},
    )
    assert answer.choices[0].text == sample.json()["generated_text"]
    assert answer.choices[0].text != ask(user, MODEL).choices[0].text
    for question in (
        lambda: ask(stranger, path),
        lambda: stranger(lambda client: client.models.retrieve(path)),
    ):
        with pytest.raises(openai.NotFoundError) as missing:
            question()
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


UNKNOWN = [
    "gpt-4o",
    "tinker://mine/sampler_weights/other",
    "tinker://mine/weights/first",
    "tinker://../first",
]


def test_an_unknown_model_is_not_found_and_never_the_base_model(user):
    for model in UNKNOWN:
        for question in (
            lambda model=model: ask(user, model),
            lambda model=model: user(lambda client: client.models.retrieve(model)),
        ):
            with pytest.raises(openai.NotFoundError) as missing:
                question()
            assert missing.value.code == "model_not_found"
            assert missing.value.type == "invalid_request_error"


def test_a_wrong_key_is_refused(user):
    user.key = "tml-wrong"

    with pytest.raises(openai.AuthenticationError) as refused:
        user(lambda client: client.models.list())
    assert refused.value.code == "invalid_api_key"
