"""The trace of a run: rows, waits and batches, in pages, and the button that leads to it."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import User
from django.test import AsyncClient, Client

from futures.models import Future
from tests.conftest import ApiClient, InProcessWorker
from tests.console.conftest import page
from tinkerapi.api.sdk.render.trace import LaneEvents, Rows
from training import timeline
from training.models import Run
from training.services import forward_backward_submit, optim_step_submit
from training.types import AdamParams, Conversation, Message

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
Event = dict[str, Any]


def request(seq_id: int, asked: float, began: float, ended: float, **fields: Any) -> Future:
    """A finished request; times in seconds."""
    created, started, finished = (BEGIN + timedelta(seconds=s) for s in (asked, began, ended))
    times = {"created_at": created, "started_at": started, "finished_at": finished}
    return Future(
        id=f"future_{seq_id}", seq_id=seq_id, kind="sample", state="ready", **times, **fields
    )


def events_of(*futures: Future) -> list[Event]:
    lane = LaneEvents("lane", Rows())
    return [event for future in futures for event in lane.events(future)] + list(lane.rest())


def bars(events: list[Event]) -> list[Event]:
    return [event for event in events if event["ph"] == "X"]


def test_a_request_waits_and_then_runs() -> None:
    events = events_of(request(1, 0, 2, 5))

    wait = [event for event in events if event.get("cat") == "wait"]
    start = int(BEGIN.timestamp() * 1e6)
    assert [(event["ph"], event["ts"] - start) for event in wait] == [("b", 0), ("e", 2_000_000)]
    [bar] = bars(events)
    assert (bar["name"], bar["ts"] - start, bar["dur"]) == ("sample", 2_000_000, 3_000_000)
    assert bar["args"]["waited_seconds"] == 2


def test_bars_of_one_row_never_overlap_in_part() -> None:
    spans = [(0, 4), (1, 6), (2, 3), (4, 5), (4, 5), (5, 9), (0, 9), (6, 7)]
    found = bars(events_of(*(request(i, 0, *span) for i, span in enumerate(spans))))

    assert len(found) == len(spans)
    for one in found:
        for other in found:
            if one["tid"] == other["tid"] and one is not other:
                a, b = ((bar["ts"], bar["ts"] + bar["dur"]) for bar in (one, other))
                assert a == b or a[1] <= b[0] or b[1] <= a[0]
    assert len({bar["tid"] for bar in found}) == 4


def test_requests_of_a_batch_are_one_span_of_their_worker() -> None:
    events = events_of(
        request(1, 0, 1, 3, worker_id=7, batch=1),
        request(2, 0, 1, 4, worker_id=7, batch=1),
        request(3, 5, 6, 7, worker_id=7, batch=2),
        request(4, 5, 6, 7, worker_id=8, batch=2),
    )

    begun = [event for event in events if event.get("cat") == "batch" and event["ph"] == "b"]
    assert [(event["name"], event["args"]["batch"]) for event in begun] == [
        ("2 sample", 1),
        ("1 sample", 2),
        ("1 sample", 2),
    ]
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"worker 7", "worker 8"} <= names
    opened = Counter((event["id"], event["ph"]) for event in events if "id" in event)
    assert all(number == 1 for number in opened.values())


@pytest.fixture
def owner(db: None) -> User:
    return User.objects.create(username="tracer", is_staff=True)


@pytest.fixture
def trained(owner: User, work: InProcessWorker) -> Run:
    data = [Conversation((Message("user", "hi"), Message("assistant", "yes")))]
    for _ in range(3):
        forward_backward_submit(
            owner_id=owner.pk,
            model_id="m",
            data=data,
            loss_fn="cross_entropy",
            loss_fn_config={},
        )
        optim_step_submit(owner_id=owner.pk, model_id="m", adam_params=AdamParams())
    work()
    return Run.objects.get(name="m")


@pytest.mark.parametrize("page_size", [1, 3, 500])
def test_a_runs_page_leads_to_its_trace_which_is_sent_in_pages(
    api: ApiClient,
    trained: Run,
    owner: User,
    monkeypatch: pytest.MonkeyPatch,
    page_size: int,
) -> None:
    monkeypatch.setattr(timeline, "PAGE", page_size)
    client = Client()
    client.force_login(owner)
    url = client.get(page(trained, "trace"))["Location"]

    async def read() -> list[bytes]:
        response = await AsyncClient().get(urlsplit(url).path)
        return [piece async for piece in response]  # type: ignore[attr-defined]

    pieces = async_to_sync(read)()
    trace = json.loads(b"".join(pieces))
    number = Future.objects.filter(lane_id=trained.pk).count()
    assert len(pieces) >= number // page_size
    assert trace["otherData"] == {"run": trained.pk}
    shown = bars(trace["traceEvents"])
    assert [bar["args"]["seq_id"] for bar in shown] == list(range(1, number + 1))
    assert Counter(bar["name"] for bar in shown)["optim_step"] == 3


def test_nobody_else_gets_a_link_to_a_trace(
    trained: Run, django_user_model: type[User], client: Client
) -> None:
    client.force_login(django_user_model.objects.create(username="other", is_staff=True))
    assert client.get(page(trained, "trace")).status_code in (403, 404)
