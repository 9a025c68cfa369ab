"""A request that waits for its result holds neither its body nor its payload meanwhile."""

from __future__ import annotations

import gc

import pytest

from futures.models import Future
from tests.conftest import ApiClient
from tinkerapi.api.quickref import render as answers

HI = [[{"role": "user", "content": "hi"}]]


def test_what_was_asked_is_let_go_of_before_the_wait(
    api: ApiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Future] = []

    async def time_is_up(request_id: str, **more: object) -> None:
        gc.collect()
        futures = [item for item in gc.get_objects() if type(item) is Future]
        held.extend(f for f in futures if f.pk == request_id and "payload" in vars(f))

    monkeypatch.setattr(answers, "future_wait", time_is_up)

    answer = api.post("/api/v1/forward_backward", model_id="m", data=HI)

    assert answer.status_code == 202
    assert "_body" not in vars(answer.wsgi_request)
    assert held == []
    assert Future.objects.get(pk=answer.json()["request_id"]).payload
