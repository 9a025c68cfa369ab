"""The endpoints of the SDK's AdminClient: audit log, usage and storage."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.auth import get_user_model
from django.db import DatabaseError, transaction
from django.test import Client
from tinker import types

from futures.models import Future
from tests.conftest import ApiClient, InProcessWorker
from tests.sdk.conftest import SdkClient
from tests.sdk.official_sdk import sdk_datum
from tinkerapi.services import api_key_create, api_key_revoke
from training.models import AuditEvent, Checkpoint


def get(client: SdkClient, path: str) -> Any:
    return client.api.get(f"/api/v1/{path}", **client.headers)


def events(client: SdkClient, query: str = "") -> list[str]:
    parsed = types.AuditLogResponse.model_validate(get(client, f"audit{query}").json())
    return [entry.event for entry in parsed.entries]


def colleague(api: ApiClient, **fields: bool) -> SdkClient:
    user = get_user_model().objects.create_user("colleague", **fields)
    return SdkClient(api, api_key_create(user=user, name="k")[1])


def test_what_is_done_to_a_checkpoint_is_logged_for_its_owner(
    api: ApiClient, sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = sdk.model()
    sdk.post("save_weights", model_id=model_id, seq_id=1, path="a")
    sdk.post("save_weights", model_id=model_id, seq_id=2, path="a", overwrite=True)
    work()
    url = f"/api/v1/training_runs/{model_id}/checkpoints/weights/a"
    send = {"content_type": "application/json", "headers": sdk.headers}
    api.client.post(f"{url}/publish", **send)
    api.client.post(f"{url}/publish", **send)  # changes nothing, so it is not recorded
    api.client.put(f"{url}/ttl", {"ttl_seconds": 4000}, **send)
    other = colleague(api)
    path = f"tinker://{model_id}/weights/a"
    other.post("load_weights", session_id=other.session(), model_seq_id=0, path=path)
    api.client.delete(url, headers=sdk.headers)

    assert events(sdk, "?event_type=checkpoints") == [
        "checkpoint_overwrite",
        "checkpoint_publish",
        "checkpoint_set_ttl",
        "checkpoint_read",
        "checkpoint_delete",
    ]
    assert events(sdk)[0] == "key_create"
    assert events(other) == ["key_create"]
    read = get(sdk, "audit").json()["entries"][-2]
    assert read["event_details"]["actor"] == "tml:user:colleague"
    assert (read["tinker_path"], read["model_id"], read["purpose"]) == (path, model_id, "load")


def test_a_day_is_chosen_and_superusers_see_everybodys(api: ApiClient, sdk: SdkClient) -> None:
    today = datetime.now(UTC).date()
    chief = colleague(api, is_superuser=True)

    assert events(sdk, f"?day={today}") == ["key_create"]
    assert events(sdk, f"?day={today - timedelta(days=1)}") == []
    assert events(sdk, "?event_type=teams") == []
    assert events(chief) == ["key_create", "key_create"]
    for query, named in (("day=yesterday", "day"), ("event_type=x", "event_type")):
        answer = get(sdk, f"audit?{query}")
        assert (answer.status_code, answer.json()["detail"].split(":")[0]) == (400, named)


@pytest.mark.django_db
def test_keys_and_what_is_done_in_the_admin_are_logged() -> None:
    chief = get_user_model().objects.create_superuser("chief")
    key, _ = api_key_create(user=chief, name="k", actor_id=chief.pk)
    assert api_key_revoke(api_key_id=key.pk, actor_id=chief.pk)
    assert not api_key_revoke(api_key_id=key.pk, actor_id=chief.pk)
    LogEntry.objects.log_actions(chief.pk, [chief], CHANGE, "Changed email.", single_object=True)

    logged = AuditEvent.objects.order_by("pk").values_list("event", "actor__username")
    assert list(logged) == [
        ("key_create", "chief"),
        ("key_revoke", "chief"),
        ("admin_action", "chief"),
    ]


def test_the_log_can_only_be_added_to(sdk: SdkClient) -> None:
    for change in (
        lambda: AuditEvent.objects.update(event="nothing"),
        lambda: AuditEvent.objects.all().delete(),
    ):
        with pytest.raises(DatabaseError, match="only be added to"), transaction.atomic():
            change()
    assert events(sdk) == ["key_create"]


@pytest.mark.django_db
def test_the_audit_page_is_the_superusers() -> None:
    users = get_user_model().objects
    for name, is_superuser, status in (("chief", True, 200), ("staff", False, 403)):
        user = users.create_user(name, is_staff=True, is_superuser=is_superuser)
        api_key_create(user=user, name="k", actor_id=user.pk)
        browser = Client()
        browser.force_login(user)
        page = browser.get("/admin/training/auditevent/")
        assert page.status_code == status
        event = AuditEvent.objects.latest("pk")
        assert browser.get(f"/admin/training/auditevent/{event.pk}/change/").status_code == status


def usage(client: SdkClient) -> types.BillingUsageResponse:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    begin, end = hour - timedelta(hours=1), hour + timedelta(hours=1)
    query = f"starting_on={begin:%Y-%m-%dT%H:%M:%SZ}&ending_before={end:%Y-%m-%dT%H:%M:%SZ}"
    answer = get(client, f"billing/usage/events?{query}")
    return types.BillingUsageResponse.model_validate(answer.json())


def test_usage_counts_tokens_and_checkpoints_by_hour_and_session(
    api: ApiClient, sdk: SdkClient, work: InProcessWorker, settings: Any
) -> None:
    model_id = sdk.model()
    data = [sdk_datum([1] * n, target_tokens=[1] * n, weights=[1.0] * n) for n in (3, 5)]
    sdk.forward_backward(model_id, 1, data)
    sdk.forward_backward(model_id, 2, data, forward_only=True)
    refused = sdk.post("save_weights", model_id=model_id, seq_id=3, path="a/b")
    sdk.post("save_weights", model_id=model_id, seq_id=4, path="a")
    colleague(api).model()
    work()
    assert "error" in sdk.result(refused)

    found = usage(sdk)
    counted = {
        event.event_info.type: getattr(event.event_info, "token_count", None)
        or getattr(event.event_info, "count", None)
        for event in found.data
    }
    session_id = model_id.partition(":")[0]
    assert sum(e.event_info.token_count for e in found.data if e.event_info.type == "training") == (
        16
    )
    assert counted["checkpoint"] == 1
    assert {event.session_id for event in found.data} == {session_id} == set(found.sessions)
    assert all(event.estimated_cost_usd is None for event in found.data)


def test_with_a_price_the_cost_is_that_of_the_time_between_batches(
    sdk: SdkClient, work: InProcessWorker, settings: Any
) -> None:
    settings.WORKER_HOUR_CENTS = 3600  # a cent a second
    models = [sdk.model(), sdk.model()]
    work()
    answers = [sdk.forward_backward(model_id, 1) for model_id in models]
    work()
    # Both ran in one batch, which began two seconds after the last and took four.
    ids = [answer.json()["request_id"] for answer in answers]
    before = Future.objects.exclude(pk__in=ids)
    moment = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=1)
    before.update(started_at=moment, finished_at=moment)
    Future.objects.filter(pk__in=ids).update(
        batch=99,
        started_at=moment + timedelta(seconds=2),
        finished_at=moment + timedelta(seconds=6),
    )

    events = [event for event in usage(sdk).data if event.event_info.type == "training"]
    assert [event.estimated_cost_usd for event in events] == pytest.approx([0.02, 0.02])
    rates = [event.effective_rate_usd_per_million_tokens for event in events]
    assert rates == pytest.approx([0.02 / 3 * 1e6] * 2)


@pytest.mark.parametrize(
    ("begin", "end", "named"),
    [
        ("2026-01-01T00:30:00Z", "2026-01-01T02:00:00Z", "starting_on"),
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z", "ending_before"),
        ("2026-01-01T00:00:00Z", "2026-01-16T00:00:00Z", "ending_before"),
        ("2999-01-01T00:00:00Z", "2999-01-02T00:00:00Z", "starting_on"),
        ("2026-01-01T00:00:00", "2026-01-02T00:00:00Z", "starting_on"),
        ("", "x", "starting_on"),
    ],
)
def test_a_window_that_makes_no_sense_is_refused_by_name(
    sdk: SdkClient, begin: str, end: str, named: str
) -> None:
    answer = get(sdk, f"billing/usage/events?starting_on={begin}&ending_before={end}")

    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(named)


def test_storage_is_what_the_listed_checkpoints_take(sdk: SdkClient, work: InProcessWorker) -> None:
    model_id = sdk.model()
    sdk.post("save_weights", model_id=model_id, seq_id=1, path="a")
    sdk.post("save_weights_for_sampler", model_id=model_id, seq_id=2, sampling_session_seq_id=0)
    work()

    body = get(sdk, "billing/usage/checkpoints/current").json()
    [item] = types.CurrentCheckpointStorageUsageResponse.model_validate(body).data
    assert item.checkpoint_count == 1
    assert item.size_bytes == Checkpoint.objects.get(name="a").size_bytes
    assert get(sdk, "billing/usage/checkpoints/current?project_id=p").json()["data"] == []


def test_a_sample_counts_its_prompt_and_its_own_tokens(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = sdk.model()
    sdk.post("save_weights_for_sampler", model_id=model_id, seq_id=1, sampling_session_seq_id=0)
    work()
    sampler_id = f"{model_id.partition(':')[0]}:sample:0"
    sdk.post(
        "asample",
        sampling_session_id=sampler_id,
        seq_id=0,
        num_samples=2,
        prompt={"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
        sampling_params={"max_tokens": 4, "stop": []},
    )
    work()

    counted = {
        event.event_info.type: event.event_info.token_count
        for event in usage(sdk).data
        if event.event_info.type.startswith("sampling")
    }
    assert counted == {"sampling_prefill": 3, "sampling_sample": 8}
