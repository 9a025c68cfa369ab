"""A client's keys and numbers of requests never conflict with another tenant's."""

from __future__ import annotations

from collections.abc import Callable

from pytest_django import Settings

from futures.models import Future
from tests.conftest import InProcessWorker
from tests.isolation.conftest import HI, Tenant, furnished


def test_the_same_idempotency_key_of_two_tenants_means_two_requests(
    tenant: Callable[[str], Tenant], work: InProcessWorker
) -> None:
    ids = []
    for name in ("zelda", "bob"):
        body = {"model_id": "m", "data": HI}
        answer = tenant(name).ask("POST", "/fwdbwd", body, headers={"Idempotency-Key": "k"})
        ids.append(answer.json()["request_id"])
    work()
    first, second = (Future.objects.get(pk=request_id) for request_id in ids)
    assert first.pk != second.pk
    assert first.owner_id != second.owner_id
    assert first.lane_id != second.lane_id
    assert {first.state, second.state} == {"ready"}


def test_the_same_key_for_another_request_of_another_tenant_is_no_conflict(
    tenant: Callable[[str], Tenant],
) -> None:
    key = {"Idempotency-Key": "k"}
    tenant("zelda").ask("POST", "/add_lora", {"model_id": "a", "rank": 4}, headers=key)
    answer = tenant("bob").ask("POST", "/add_lora", {"model_id": "b", "rank": 8}, headers=key)
    assert answer.status_code == 200
    assert answer.json()["model_id"] == "b"


def test_the_same_numbers_of_two_tenants_are_two_requests(
    tenant: Callable[[str], Tenant], work: InProcessWorker
) -> None:
    clients = [tenant(name).sdk for name in ("zelda", "bob")]
    steps = [client.optim_step(client.model(), 1) for client in clients]
    work()
    assert steps[0].json()["request_id"] != steps[1].json()["request_id"]
    for client, step in zip(clients, steps, strict=True):
        assert client.result(step)["metrics"]["step"] == 1


def test_the_same_copy_key_of_two_tenants_makes_two_copies(
    tenant: Callable[[str], Tenant], work: InProcessWorker
) -> None:
    paths = []
    for name in ("zelda", "bob"):
        one = tenant(name)
        ids = furnished(one, work)
        source = f"tinker://{ids['sdk_model']}/weights/{ids['checkpoint']}"
        answer = one.ask(
            "POST",
            "/api/v1/copy_weights",
            {"source_path": source},
            sdk=True,
            headers={"X-Idempotency-Key": "k"},
        )
        assert answer.status_code == 200, answer.content
        paths.append(answer.json()["tinker_path"])
    assert paths[0] != paths[1]


def test_a_full_queue_is_full_for_its_owner_only(
    tenant: Callable[[str], Tenant], settings: Settings
) -> None:
    settings.MAX_PENDING = 3
    zelda, bob = tenant("zelda"), tenant("bob")
    body = {"model_id": "m", "data": HI}
    statuses = [zelda.ask("POST", "/fwdbwd", body).status_code for _ in range(4)]
    assert statuses[-1] == 429
    assert bob.ask("POST", "/fwdbwd", body).status_code == 200


def test_models_of_another_do_not_count_against_ones_limit(
    tenant: Callable[[str], Tenant], settings: Settings
) -> None:
    settings.MAX_ADAPTERS = 1
    zelda, bob = tenant("zelda"), tenant("bob")
    assert zelda.ask("POST", "/add_lora", {"model_id": "a"}).status_code == 200
    assert zelda.ask("POST", "/add_lora", {"model_id": "b"}).status_code == 400
    assert bob.ask("POST", "/add_lora", {"model_id": "a"}).status_code == 200
