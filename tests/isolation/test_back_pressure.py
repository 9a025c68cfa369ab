"""A full queue: every dialect says so, and when to come back; nothing is half accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pytest_django import Settings

from futures.models import Future, Lane, Worker
from tests.conftest import InProcessWorker
from tests.isolation.conftest import HI, Tenant

LIMIT = 5
PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}

Ask = Callable[[Tenant, dict[str, str]], Any]


def quick(path: str, **body: Any) -> Ask:
    return lambda user, ids: user.ask("POST", path, {**body, "model_id": ids["plain"]})


def sdk(path: str, **body: Any) -> Ask:
    def ask(user: Tenant, ids: dict[str, str]) -> Any:
        filled = {
            name: ids.get(value, value) if isinstance(value, str) else value
            for name, value in body.items()
        }
        return user.ask("POST", f"/api/v1/{path}", filled, sdk=True)

    return ask


def openai(path: str, **body: Any) -> Ask:
    return lambda user, ids: user.ask("POST", path, {**body, "model": ids["base_model"]})


ASKS: dict[str, Ask] = {
    "waiting": quick("/api/v1/forward_backward", data=HI),
    "async": quick("/api/v1/optim_step_async"),
    "short name": quick("/fwd", data=HI),
    "sample": quick("/api/v1/asample", prompt=[1]),
    "save": quick("/save_weights", name="a"),
    "a new model": lambda user, ids: user.ask("POST", "/add_lora", {"model_id": "new"}),
    "sdk step": sdk("optim_step", model_id="model", seq_id=1, adam_params={}),
    "sdk pass, protobuf": lambda user, ids: user.sdk.forward_backward(ids["model"], 1),
    "sdk sample": sdk("asample", sampling_session_id="sampler", seq_id=1, prompt=PROMPT),
    "sdk model": sdk("create_model", session_id="session", model_seq_id=5, base_model="base_model"),
    "openai completion": openai("/v1/completions", prompt="x"),
    "openai chat": openai("/v1/chat/completions", messages=HI[0]),
}


@pytest.fixture
def user(tenant: Callable[[str], Tenant]) -> Tenant:
    return tenant("busy")


@pytest.fixture
def ids(user: Tenant, base_model: str, work: InProcessWorker) -> dict[str, str]:
    """The user's rows."""
    session = user.sdk.session()
    made = user.sdk.post(
        "create_sampling_session",
        session_id=session,
        sampling_session_seq_id=1,
        base_model=base_model,
    )
    found = {
        "session": session,
        "model": user.sdk.model(session),
        "sampler": made.json()["sampling_session_id"],
        "base_model": base_model,
        "plain": "m",
    }
    user.ask("POST", "/add_lora", {"model_id": "m"})
    work()
    return found


def rows() -> tuple[int, dict[str, tuple[int, int]]]:
    """How many futures there are, and where each lane stands."""
    lanes = Lane.objects.values_list("id", "last_seq_id", "next_seq_id")
    return Future.objects.count(), {lane: (last, following) for lane, last, following in lanes}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS.keys())
def test_a_full_queue_is_429_with_a_reason_and_a_time_and_leaves_nothing(
    user: Tenant, ids: dict[str, str], settings: Settings, ask: Ask
) -> None:
    settings.MAX_PENDING = LIMIT
    for _ in range(LIMIT):
        user.ask("POST", "/optim_step", {"model_id": "m"})
    before = rows()

    answer = ask(user, ids)

    assert answer.status_code == 429
    assert int(answer["Retry-After"]) > 0
    body = answer.json()
    reason = body["error"]["message"] if "error" in body else body["detail"]
    assert f"{LIMIT} of your requests wait, as many as one user may have" in reason
    assert rows() == before


def test_what_is_accepted_already_is_answered_while_the_queue_is_full(
    user: Tenant, ids: dict[str, str], settings: Settings, work: InProcessWorker
) -> None:
    settings.MAX_PENDING = LIMIT
    key = {"Idempotency-Key": "k"}
    body = {"model_id": "m"}
    first = user.ask("POST", "/optim_step", body, headers=key)
    numbered = ASKS["sdk step"](user, ids)
    for _ in range(LIMIT):
        user.ask("POST", "/optim_step", body)

    assert user.ask("POST", "/optim_step", body, headers=key).json() == first.json()
    assert ASKS["sdk step"](user, ids).json() == numbered.json()

    work()
    assert user.ask("POST", "/optim_step", body).status_code == 200


def test_the_refused_number_of_an_sdk_request_is_free_when_there_is_room(
    user: Tenant, ids: dict[str, str], settings: Settings, work: InProcessWorker
) -> None:
    settings.MAX_PENDING = LIMIT
    for _ in range(LIMIT):
        user.ask("POST", "/optim_step", {"model_id": "m"})
    assert ASKS["sdk step"](user, ids).status_code == 429

    work()
    again = ASKS["sdk step"](user, ids)
    work()

    assert user.sdk.result(again)["metrics"]["step"] == 1


def test_a_pending_answer_says_how_long_it_takes_in_both_dialects(
    user: Tenant, ids: dict[str, str], work: InProcessWorker, nobody_waits: None
) -> None:
    Worker.objects.update(state="live", figures={"futures_per_second": 5.0})
    for _ in range(3):
        last = user.ask("POST", "/optim_step", {"model_id": "m"}).json()["request_id"]

    quick_answer = user.ask("POST", "/retrieve_future", {"request_id": last})
    sdk_answer = user.ask("POST", "/api/v1/retrieve_future", {"request_id": last}, sdk=True)

    assert (quick_answer.status_code, sdk_answer.status_code) == (202, 408)
    for body in (quick_answer.json(), sdk_answer.json()):
        assert body["queue_state"] == "active"
        assert (body["queue_position"], body["estimated_wait_seconds"]) == (2, 0.6)
