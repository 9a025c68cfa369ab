"""One user's share of the disk and the database, and the errors when it is used up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test.utils import CaptureQueriesContext
from pytest_django import Settings

from futures.models import Future
from tests.conftest import ApiClient, InProcessWorker
from tests.sdk.conftest import SdkClient
from tests.sdk.test_custom_losses import upload
from tests.sdk.test_sampling import sample, sampling_session
from training import storage_quota
from training.models import Checkpoint, CustomLoss, RecordedSample, Session
from training.storage_quota import storage_use

HI = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]]

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def counted_anew() -> Iterator[None]:
    storage_quota.forget_counts()
    yield
    storage_quota.forget_counts()


@pytest.fixture
def allow(settings: Settings) -> Callable[[int], None]:
    """``allow(100)``: this many bytes more than are used now."""

    def limit(more_bytes: int) -> None:
        settings.USER_STORAGE_BYTES = storage_use(local().pk).total + more_bytes

    return limit


def local() -> User:
    return User.objects.get(username="local")


def state(api: ApiClient, answer: object) -> tuple[int, str]:
    retrieved = api.post("/retrieve_future", request_id=answer.json()["request_id"])  # type: ignore[attr-defined]
    return retrieved.status_code, retrieved.json().get("error_code", "")


def test_what_is_used_is_what_is_stored(api: ApiClient, work: InProcessWorker) -> None:
    api.post("/fwdbwd", model_id="m", data=HI)
    api.post("/save_weights", model_id="m", name="kept")
    work()

    use = storage_use(local().pk)

    rows = Future.objects.values_list("payload", "result")
    assert use.requests == sum(len(payload or b"") + len(result or b"") for payload, result in rows)
    assert use.checkpoints == Checkpoint.objects.get().size_bytes > 0
    assert storage_use(local().pk + 1).total == 0


def test_custom_losses_and_recorded_samples_count_as_requests_of_their_owner(
    api: ApiClient, work: InProcessWorker
) -> None:
    sdk = SdkClient.with_new_key(api)
    session = sdk.session()
    upload(sdk, session)
    sampler = sampling_session(sdk, session).json()["sampling_session_id"]
    sample(sdk, sampler, record_stability_info=True)
    work()

    owner_id = Session.objects.get(pk=session).owner_id
    use = storage_use(owner_id)

    rows = Future.objects.filter(owner_id=owner_id).values_list("payload", "result")
    of_futures = sum(len(payload or b"") + len(result or b"") for payload, result in rows)
    recorded = len(bytes(RecordedSample.objects.get().data))
    graph = use.requests - of_futures - recorded
    # As jsonb keeps it, maybe compressed: neither nothing nor much more than its text.
    assert 100 < graph < 2 * len(json.dumps(CustomLoss.objects.get().graph))


def test_a_custom_loss_over_the_limit_is_refused_and_its_repeat_answered(
    api: ApiClient, settings: Settings
) -> None:
    sdk = SdkClient.with_new_key(api)
    session = sdk.session()
    kept = upload(sdk, session).json()
    settings.USER_STORAGE_BYTES = 1

    assert upload(sdk, session).json() == kept
    refused = upload(sdk, session, 1)

    assert refused.status_code == 413
    assert "that one user may take" in refused.json()["detail"]
    assert CustomLoss.objects.count() == 1


def test_over_the_limit_everything_is_refused_but_what_frees(
    api: ApiClient, work: InProcessWorker, allow: Callable[[int], None]
) -> None:
    api.post("/fwdbwd", model_id="m", data=HI)
    api.post("/save_weights", model_id="m", name="kept")
    work()
    allow(0)

    for path, body in (
        ("/fwdbwd", {"model_id": "m", "data": HI}),
        ("/optim_step", {"model_id": "m"}),
        ("/api/v1/asample", {"model_id": "m", "messages": HI[0][:1]}),
        ("/api/v1/asample", {"base_model": "any", "messages": HI[0][:1]}),
        ("/save_weights", {"model_id": "m", "name": "more"}),
        ("/add_lora", {"model_id": "other", "rank": 4}),
    ):
        if body.get("base_model"):
            body = {**body, "base_model": Checkpoint.objects.get().run.base_model}
        answer = api.post(path, **body)
        assert answer.status_code == 413, (path, answer.content)
        assert answer.json()["error_code"] == "StorageQuotaExceeded"
        for word in ("checkpoints", "snapshots", "requests", "Delete checkpoints, or remove"):
            assert word in answer.json()["detail"]

    assert api.post("/remove_lora", model_id="m").status_code == 200


def test_what_was_accepted_before_is_still_answered(
    api: ApiClient, allow: Callable[[int], None]
) -> None:
    key = {"Idempotency-Key": "one"}
    first = api.post("/fwdbwd", model_id="m", data=HI, headers=key).json()
    allow(0)

    assert api.post("/fwdbwd", model_id="m", data=HI, headers=key).json() == first


def test_a_save_that_does_not_fit_fails_by_name_and_leaves_no_files(
    api: ApiClient, work: InProcessWorker, allow: Callable[[int], None], settings: Settings
) -> None:
    api.post("/save_weights", model_id="m", name="kept")
    api.post("/fwdbwd", model_id="m", data=HI)
    api.post("/save_weights", model_id="m", name="kept")
    work()
    size = Checkpoint.objects.get().size_bytes
    files = set((Path(settings.DATA_DIR) / "checkpoints").iterdir())
    allow(size)
    saved = api.post("/save_weights", model_id="m", name="too-much")
    work()

    assert state(api, saved) == (500, "StorageQuotaExceeded")
    assert Checkpoint.objects.count() == 1
    assert set((Path(settings.DATA_DIR) / "checkpoints").iterdir()) == files


def test_many_saves_at_once_do_not_pass_the_limit_together(
    api: ApiClient, work: InProcessWorker, allow: Callable[[int], None]
) -> None:
    api.post("/fwdbwd", model_id="m", data=HI)
    api.post("/save_weights", model_id="m", name="kept")
    work()
    size = Checkpoint.objects.get().size_bytes
    allow(3 * size)

    saves = [api.post("/save_weights", model_id="m", name=f"more-{n}") for n in range(8)]
    work()

    states = [state(api, answer) for answer in saves if answer.status_code == 200]
    assert states.count((500, "StorageQuotaExceeded")) >= 5
    assert Checkpoint.objects.count() <= 1 + 3


def test_overwriting_needs_room_only_for_what_is_larger(
    api: ApiClient, work: InProcessWorker, allow: Callable[[int], None]
) -> None:
    api.post("/fwdbwd", model_id="m", data=HI)
    api.post("/save_weights", model_id="m", name="kept")
    work()
    allow(Checkpoint.objects.get().size_bytes // 2)

    saved = api.post("/save_weights", model_id="m", name="kept", overwrite=True)
    work()

    assert state(api, saved)[0] == 200


def test_a_refused_request_of_the_sdk_uses_up_its_number(
    api: ApiClient, work: InProcessWorker, settings: Settings
) -> None:
    sdk = SdkClient.with_new_key(api)
    model_id = sdk.model()
    work()
    settings.USER_STORAGE_BYTES = 1
    refused = sdk.forward_backward(model_id, 1)
    settings.USER_STORAGE_BYTES = 0
    stepped = sdk.optim_step(model_id, 2)
    work()

    assert "of the 1 byte that one user may take" in sdk.retrieve(refused).json()["error"]
    assert sdk.retrieve(stepped).status_code == 200
    assert "error" not in sdk.retrieve(stepped).json()


def test_requests_are_not_counted_again_for_each_request(
    api: ApiClient, settings: Settings
) -> None:
    settings.USER_STORAGE_BYTES = 10**9
    api.post("/fwdbwd", model_id="m", data=HI)

    with CaptureQueriesContext(
        connection,
    ) as queries:
        known = storage_use(local().pk).requests

    assert not [query for query in queries if "octet_length" in query["sql"]]
    assert known == sum(len(bytes(row)) for row in Future.objects.values_list("payload", flat=True))


def test_without_a_limit_nothing_is_asked(api: ApiClient, settings: Settings) -> None:
    api.post("/fwdbwd", model_id="m", data=HI)
    settings.USER_STORAGE_BYTES = 0

    with CaptureQueriesContext(connection) as queries:
        api.post("/fwdbwd", model_id="m", data=HI)

    assert not [query for query in queries if "size_bytes" in query["sql"]]
