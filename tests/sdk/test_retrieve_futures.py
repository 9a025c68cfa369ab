"""retrieve_futures: the answers to one client of a sampling session, including repeats."""

from __future__ import annotations

import asyncio
import threading
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.utils import timezone

from futures.models import Future
from futures.selectors import lane_completions
from tests.conftest import ApiClient, InProcessWorker
from tests.sdk.conftest import SdkClient
from tests.sdk.test_sampling import new_sampler, sample
from tests.waiting import LONG_SECONDS
from tinkerapi.api.sdk.views import sampling as views
from tinkerapi.services import api_key_create


def poll(sdk: SdkClient, sampler: str, cursor: int = 0, *, client: int = 0, **more: object) -> Any:
    target = {
        "type": "sampling_session",
        "sampling_session_id": sampler,
        "cloned_sampler_id": client,
    }
    fields = {"target": target, "prev_cursor": cursor, "timeout": 0, "retrieved_request_ids": []}
    answer = sdk.post("retrieve_futures", **{**fields, **more})
    assert answer.status_code == 200, answer.content
    return answer.json()


def ids(told: Any) -> set[str]:
    return {item["request_id"] for item in told["completions"]}


def request_id(answer: Any) -> str:
    return str(answer.json()["request_id"])


def test_everything_is_told_once_to_the_client_that_asked_for_it(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    sampler = new_sampler(sdk)
    before = poll(sdk, sampler)
    first = [sample(sdk, sampler, seq_id) for seq_id in (0, 1)]
    clones = sample(sdk, sampler, 3 * 10**9)
    work()

    told = poll(sdk, sampler)
    again = poll(sdk, sampler, told["cursor"])
    later = sample(sdk, sampler, 2)
    work()
    last = poll(sdk, sampler, told["cursor"], retrieved_request_ids=sorted(ids(told)))

    assert before == {"completions": [], "cursor": 0}
    assert ids(told) == {request_id(answer) for answer in first}
    assert again == {"completions": [], "cursor": told["cursor"]}
    assert ids(last) == {request_id(later)}
    assert last["cursor"] > told["cursor"]
    assert ids(poll(sdk, sampler, client=3)) == {request_id(clones)}
    assert ids(poll(sdk, sampler)) == ids(told) | ids(last)


def test_failed_and_cancelled_ones_are_told_as_failed(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    sampler = new_sampler(sdk)
    beyond = {"chunks": [{"type": "encoded_text", "tokens": [10**6]}]}
    answers = [sample(sdk, sampler, 0, prompt=beyond), sample(sdk, sampler, 1)]
    sdk.post("cancel_future", request_id=request_id(answers[1]))
    work()

    told = poll(sdk, sampler)

    assert ids(told) == {request_id(answer) for answer in answers}
    assert {item["state"] for item in told["completions"]} == {"failed"}


def test_what_has_one_moment_is_told_together(sdk: SdkClient, work: InProcessWorker) -> None:
    sampler = new_sampler(sdk)
    for seq_id in range(4):
        sample(sdk, sampler, seq_id)
    work()
    now = timezone.now()
    Future.objects.filter(lane_id=sampler).update(finished_at=now)
    Future.objects.filter(lane_id=sampler, seq_id=3).update(finished_at=now + timedelta(seconds=1))

    told, cursor = lane_completions(lane_id=sampler, seq_ids=range(9), after=0, limit=2)
    rest, _ = lane_completions(lane_id=sampler, seq_ids=range(9), after=cursor, limit=2)

    assert (len(told), len(rest)) == (3, 1)


def test_a_poll_in_vain_looks_back_for_what_a_cancellation_passed_by(
    sdk: SdkClient, work: InProcessWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "read_when_woken", nothing_happens)
    sampler = new_sampler(sdk)
    late = sample(sdk, sampler, 0)
    work()
    finished_at = Future.objects.get(pk=request_id(late)).finished_at
    assert finished_at is not None
    cursor = int((finished_at.timestamp() + 1) * 1e6)

    told = poll(sdk, sampler, cursor, timeout=1)

    assert ids(told) == {request_id(late)}
    assert told["cursor"] == cursor


async def nothing_happens(*args: object, **more: object) -> None:
    return None


def test_anothers_sampling_session_is_404(sdk: SdkClient, api: ApiClient) -> None:
    sampler = new_sampler(sdk)
    _, key = api_key_create(user=get_user_model().objects.create_user("colleague"), name="k")
    target = {"type": "sampling_session", "sampling_session_id": sampler}

    answer = SdkClient(api, key).post("retrieve_futures", target=target, prev_cursor=0)

    assert (answer.status_code, answer.json()["error_code"]) == (404, "SamplingSessionNotFound")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"target": {"type": "model"}}, "target.type"),
        ({"prev_cursor": -1}, "prev_cursor"),
        ({"timeout": -1}, "timeout"),
        ({"retrieved_request_ids": "x"}, "retrieved_request_ids"),
    ],
)
def test_a_poll_that_cannot_be_is_refused_by_name(
    sdk: SdkClient, fields: dict[str, object], named: str
) -> None:
    target = {"type": "sampling_session", "sampling_session_id": new_sampler(sdk)}

    answer = sdk.post("retrieve_futures", **{"target": target, **fields})

    assert answer.status_code == 400
    assert named in answer.json()["detail"]


def test_a_held_poll_is_answered_by_a_sample_that_came_after_it(served_api: ApiClient) -> None:
    sdk = SdkClient.with_new_key(served_api)
    sampler = new_sampler(sdk)
    held = threading.Event()
    begin = asyncio.Event.wait

    async def waiting(event: asyncio.Event) -> Any:
        held.set()
        return await begin(event)

    told: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.Event, "wait", waiting)
        thread = threading.Thread(
            target=lambda: told.append(poll(sdk, sampler, timeout=None)), name="poll"
        )
        thread.start()
        assert held.wait(LONG_SECONDS)
        answer = sample(sdk, sampler, 0)
        thread.join(LONG_SECONDS)

    assert ids(told[0]) == {request_id(answer)}
