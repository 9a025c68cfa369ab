"""The tokens of one user in a day: what is refused, what is not, and many requests at once."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from django.contrib.auth.models import User
from pytest_django import Settings

from futures.models import Future
from tests.conftest import ApiClient, InProcessWorker
from tests.training.test_races import at_once
from training.base_models import base_model_get
from training.errors import TokenQuotaExceeded
from training.models import DailyUsage
from training.services import sample_submit
from training.types import SamplingParams
from training.usage import today, tokens_used

PROMPT = np.array([1, 2, 3], dtype=np.int32)


def submit(owner: User, *, max_tokens: int = 7, key: str | None = None) -> Future:
    """A sample of a prompt of three tokens: ten tokens at most by default."""
    return sample_submit(
        owner_id=owner.pk,
        model_id=None,
        base_model=base_model_get(None).name,
        model_path=None,
        prompts=[PROMPT],
        num_samples=1,
        sampling_params=SamplingParams(max_tokens=max_tokens, seed=1, stop=()),
        prompt_logprobs=False,
        idempotency_key=key,
    ).future


@pytest.fixture
def ada(db: None) -> User:
    return User.objects.create(username="ada")


def test_what_may_exceed_the_day_is_refused_and_says_why(ada: User, settings: Settings) -> None:
    settings.USER_TOKENS_PER_DAY = 25
    submit(ada)
    submit(ada, key="once")
    with pytest.raises(TokenQuotaExceeded) as refused:
        submit(ada)
    assert str(refused.value) == (
        "this request may use 10 tokens; of the 25 that one user may use in a day you have used "
        "0, and your waiting requests may use 20. Send it again after 00:00 UTC, send less data, "
        "or set a smaller max_tokens"
    )
    assert submit(ada, key="once").pk == Future.objects.get(idempotency_key="once").pk
    submit(ada, max_tokens=2)
    submit(User.objects.create(username="ben"))


def test_what_was_reserved_and_not_used_is_free_again(
    ada: User, settings: Settings, work: InProcessWorker
) -> None:
    settings.USER_TOKENS_PER_DAY = 100
    submit(ada, max_tokens=97)
    with pytest.raises(TokenQuotaExceeded):
        submit(ada, max_tokens=0)
    work()
    used = tokens_used(ada.pk, today())
    future = Future.objects.get()
    assert used == 3 + future.summary["tokens"]
    DailyUsage.objects.filter(work="sampling").update(tokens=40)  # it ended early
    submit(ada, max_tokens=54)
    with pytest.raises(TokenQuotaExceeded, match="you have used 43, and your waiting requests may"):
        submit(ada, max_tokens=0)


def test_yesterday_does_not_count(ada: User, settings: Settings) -> None:
    settings.USER_TOKENS_PER_DAY = 10
    DailyUsage.objects.create(
        owner=ada, day=today() - timedelta(days=1), work="training", requests=1, tokens=10,
        seconds=1,
    )  # fmt: skip
    submit(ada)


@pytest.mark.django_db(transaction=True)
def test_requests_sent_at_once_do_not_exceed_it_together(settings: Settings) -> None:
    ada = User.objects.create(username="ada")
    settings.USER_TOKENS_PER_DAY = 35

    results = at_once(*[lambda: submit(ada)] * 8)

    assert sum(isinstance(result, TokenQuotaExceeded) for result in results) == 5
    assert sum(isinstance(result, Future) for result in results) == Future.objects.count() == 3


@pytest.mark.django_db
def test_over_http_it_is_a_403_and_steps_saves_and_deletions_still_work(
    api: ApiClient, settings: Settings, work: InProcessWorker
) -> None:
    settings.USER_TOKENS_PER_DAY = 1
    data: Any = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]]
    api.post("/api/v1/add_lora_async", model_id="m")
    refused = api.post("/fwdbwd", model_id="m", data=data)
    assert refused.status_code == 403
    assert refused.json()["error_code"] == "TokenQuotaExceeded"
    assert "that one user may use in a day" in refused.json()["detail"]
    for path, more in (("/save_weights", {"name": "x"}), ("/api/v1/remove_lora_async", {})):
        assert api.post(path, model_id="m", **more).status_code == 200
