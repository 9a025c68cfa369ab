"""A base model that the server served yesterday and does not serve today: no request waits in
vain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_django import Settings

from futures.claiming import future_claim
from futures.errors import QueueNotServed
from futures.models import Future
from futures.resubmitting import future_resubmit
from tests.base_models import base_model_configs
from tests.conftest import ApiClient, InProcessWorker
from tests.sdk.conftest import SdkClient
from tests.waiting import LONG_SECONDS
from training.base_models import base_model_get
from training.models import Run, Snapshot

HI = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]]


@pytest.fixture
def restart(settings: Settings) -> Callable[[str], None]:
    """``restart("other")``: the server comes up again with another base model."""

    def serve(name: str) -> None:
        settings.BASE_MODELS = base_model_configs(name)

    return serve


@pytest.fixture
def sdk(api: ApiClient) -> SdkClient:
    return SdkClient.with_new_key(api)


def test_every_call_about_its_models_is_answered_at_once(
    api: ApiClient, work: InProcessWorker, restart: Callable[[str], None]
) -> None:
    api.post("/add_lora", model_id="left-over", rank=4)
    work()
    restart("other/model")

    calls: dict[str, dict[str, object]] = {
        "forward": {"data": HI},
        "forward_backward": {"data": HI},
        "optim_step": {},
        "sample": {"messages": HI[0][:1]},
        "save_weights": {"name": "kept"},
        "save_weights_for_sampler": {"name": "kept"},
    }
    paths = [*calls, *(f"{name}_async" for name in calls if name != "sample"), "asample"]
    for path in paths:
        body = calls[path.removesuffix("_async").removeprefix("a")]
        answer = api.post(f"/api/v1/{path}", model_id="left-over", **body)
        assert answer.status_code == 404, (path, answer.content)
        assert "is not served here; choose one of other/model" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["remove_lora", "remove_lora_async"])
def test_removing_such_a_model_needs_no_worker(
    api: ApiClient,
    work: InProcessWorker,
    restart: Callable[[str], None],
    settings: Settings,
    django_capture_on_commit_callbacks: Any,
    path: str,
) -> None:
    api.post("/add_lora", model_id="left-over", rank=4)
    work()
    run = Run.objects.get()
    folder = Path(settings.DATA_DIR) / "snapshots" / "left-over"
    folder.mkdir(parents=True, exist_ok=True)
    Snapshot.objects.create(
        run=run,
        seq_id=1,
        step=0,
        directory="snapshots/left-over",
        size_bytes=1,
        write_seconds=0.1,
        epoch=1,
    )
    waits = api.post("/fwdbwd", model_id="left-over", data=HI).json()["request_id"]
    restart("other/model")

    with django_capture_on_commit_callbacks(execute=True):
        answer = api.post(f"/api/v1/{path}", model_id="left-over")

    if path.endswith("_async"):
        answer = api.post("/retrieve_future", request_id=answer.json()["request_id"])
    assert (answer.status_code, answer.json()) == (
        200,
        {"status": "deleted", "model_id": "left-over"},
    )
    assert not Snapshot.objects.exists()
    assert not folder.exists()
    failed = api.post("/retrieve_future", request_id=waits)
    assert (failed.status_code, failed.json()["error_code"]) == (500, "BaseModelNotFound")
    assert api.post("/get_info", model_id="left-over").status_code == 404


def test_what_a_worker_of_it_still_runs_then_cannot_be_committed(
    api: ApiClient, work: InProcessWorker, restart: Callable[[str], None]
) -> None:
    api.post("/fwdbwd", model_id="left-over", data=HI)
    claimed = future_claim(worker=work.worker, max_futures=1, max_cost=10**6)
    restart("other/model")

    removed = api.post("/remove_lora", model_id="left-over")

    assert removed.status_code == 200, removed.content
    assert Future.objects.get(pk=claimed[0].pk).state == "failed"
    assert set(Future.objects.values_list("state", flat=True)) == {"failed", "ready"}


def test_a_repeated_removal_is_the_first_one(
    api: ApiClient, work: InProcessWorker, restart: Callable[[str], None]
) -> None:
    api.post("/add_lora", model_id="left-over", rank=4)
    work()
    key = {"Idempotency-Key": "remove it"}
    restart("other/model")

    answers = [
        api.post("/remove_lora", model_id="left-over", headers=key).json()["request_id"]
        for _ in range(2)
    ]

    assert answers[0] == answers[1]


def test_a_repeat_is_answered_with_the_first_future(
    api: ApiClient, sdk: SdkClient, work: InProcessWorker, restart: Callable[[str], None]
) -> None:
    served = base_model_get(None).name
    model, sampling = (
        sdk.model(session := sdk.session()),
        sdk.post(
            "create_sampling_session",
            session_id=session,
            sampling_session_seq_id=0,
            base_model=served,
        ).json()["sampling_session_id"],
    )
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1]}]}

    def send() -> list[Any]:
        return [
            api.post("/optim_step", model_id="m", headers={"Idempotency-Key": "step"}),
            api.post(
                "/api/v1/asample",
                base_model=served,
                prompt="so",
                headers={"Idempotency-Key": "sample"},
            ),
            sdk.forward_backward(model, 1),
            sdk.post(
                "asample",
                sampling_session_id=sampling,
                seq_id=1,
                prompt=prompt,
                sampling_params={"max_tokens": 2},
                num_samples=1,
            ),
        ]

    api.post("/add_lora", model_id="m", rank=4)
    first = send()
    restart("other/model")
    again = send()

    assert [answer.status_code for answer in first] == [200] * 4
    ids = [[answer.json().get("request_id") for answer in sent] for sent in (first, again)]
    assert ids[0] == ids[1]
    assert "is not served here" in sdk.result(sdk.forward_backward(model, 2))["error"]
    with pytest.raises(QueueNotServed, match="serve its base model again"):
        future_resubmit(request_id=ids[0][0])


def test_a_request_from_before_is_kept_says_what_it_waits_for_and_goes_on(
    served_api: ApiClient, restart: Callable[[str], None], settings: Settings
) -> None:
    served = settings.BASE_MODELS[0].name
    made = served_api.post("/api/v1/add_lora", model_id="m", rank=4)
    assert made.status_code == 200
    request_id = served_api.post("/fwdbwd", model_id="m", data=HI).json()["request_id"]
    # Taken from under the worker while it runs, it would end the worker.
    ready = served_api.post("/retrieve_future", request_id=request_id, wait=LONG_SECONDS)
    assert ready.status_code == 200
    Future.objects.filter(pk=request_id).update(
        state="pending",
        worker=None,
        started_at=None,
        finished_at=None,
        result=None,
        queue="engine-elsewhere",
    )

    answer = served_api.post("/retrieve_future", request_id=request_id, wait=LONG_SECONDS)

    assert answer.status_code == 202
    assert answer.json()["queue_state"] == "paused_capacity"
    assert answer.json()["estimated_wait_seconds"] is None
    assert answer.json()["queue_state_reason"] == (
        f"This server does not serve base model {served} any more; the request runs once it is "
        "served again."
    )


def test_its_models_go_on_when_it_comes_back(
    api: ApiClient, work: InProcessWorker, restart: Callable[[str], None], settings: Settings
) -> None:
    served = settings.BASE_MODELS[0].name
    waits = api.post("/fwdbwd", model_id="m", data=HI).json()["request_id"]
    restart("other/model")
    assert api.post("/retrieve_future", request_id=waits).status_code == 202
    restart(served)
    work()

    assert api.post("/retrieve_future", request_id=waits).status_code == 200
    assert api.post("/fwdbwd", model_id="m", data=HI).status_code == 200


def test_the_sdk_is_told_the_same(
    sdk: SdkClient, work: InProcessWorker, restart: Callable[[str], None]
) -> None:
    model_id = sdk.model()
    work()
    restart("other/model")

    refused = sdk.retrieve(sdk.forward_backward(model_id, 1)).json()
    assert refused["category"] == "user"
    assert "is not served here" in refused["error"]
    unloaded = sdk.post("unload_model", model_id=model_id, type="unload_model")
    assert sdk.result(unloaded)["model_id"] == model_id
