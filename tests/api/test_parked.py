"""A request that waits for its result holds neither its body nor its payload meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from futures.models import Future
from tests.conftest import ApiClient
from tinkerapi.api import answers

HI = [[{"role": "user", "content": "hi"}]]


def test_what_was_asked_is_let_go_of_before_the_wait(
    api: ApiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[Future] = []
    pending_answer = answers.pending_answer

    async def time_is_up(*args: object, **more: object) -> None:
        return None

    def told(future: Future, **more: Any) -> Any:
        waiting.append(future)
        return pending_answer(future, **more)

    monkeypatch.setattr(answers, "future_wait", time_is_up)
    monkeypatch.setattr(answers, "pending_answer", told)

    answer = api.post("/api/v1/forward_backward", model_id="m", data=HI)

    assert answer.status_code == 202
    assert "_body" not in vars(answer.wsgi_request)
    assert waiting[0].get_deferred_fields() == {"payload"}
    assert Future.objects.get(pk=waiting[0].pk).payload
