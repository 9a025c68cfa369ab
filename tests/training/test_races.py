"""Requests that meet at the same moment, on real connections: the database says who was first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection
from pytest_django import Settings

from futures.models import Future, Lane
from training import services
from training.errors import LimitExceeded, RunExists, RunNotFound
from training.models import Run
from training.types import Conversation, LoraConfig, Message

pytestmark = pytest.mark.django_db(transaction=True)

CLIENTS = 6


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Make the calls in a thread each, starting together; their results or exceptions."""
    results: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(index: int, call: Callable[[], Any]) -> None:
        try:
            barrier.wait()
            results[index] = call()
        except Exception as error:
            results[index] = error
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def ada(transactional_db: None) -> User:
    return User.objects.create_user("ada")


def forward_backward(owner: User, model_id: str) -> Callable[[], services.Submission]:
    return lambda: services.forward_backward_submit(
        owner_id=owner.pk,
        model_id=model_id,
        data=[Conversation((Message("user", "hi"),))],
        loss_fn="cross_entropy",
        loss_fn_config={},
    )


def create(owner: User, model_id: str) -> Callable[[], services.Submission]:
    return lambda: services.run_create_submit(
        owner_id=owner.pk, model_id=model_id, base_model=None, lora_config=LoraConfig()
    )


def test_first_requests_of_one_name_make_one_run_and_its_creation_comes_first(ada: User) -> None:
    submissions = at_once(*[forward_backward(ada, "m")] * CLIENTS)
    run = Run.objects.get()
    assert {submission.future.lane_id for submission in submissions} == {run.id}
    futures = Future.objects.filter(lane_id=run.id).order_by("seq_id")
    assert [f.seq_id for f in futures] == list(range(1, CLIENTS + 2))
    assert [f.kind for f in futures][:2] == ["create_run", "forward_backward"]
    assert futures.filter(kind="create_run").count() == 1


def test_one_of_many_creations_of_a_name_wins(ada: User) -> None:
    results = at_once(*[create(ada, "m")] * CLIENTS)
    assert sum(isinstance(result, RunExists) for result in results) == CLIENTS - 1
    assert Run.objects.count() == Lane.objects.count() == Future.objects.count() == 1


def test_one_of_many_removals_wins(ada: User) -> None:
    create(ada, "m")()
    results = at_once(
        *[lambda: services.run_remove_submit(owner_id=ada.pk, model_id="m")] * CLIENTS
    )
    assert sum(isinstance(result, RunNotFound) for result in results) == CLIENTS - 1
    assert Future.objects.filter(kind="remove_run").count() == 1


def test_the_limit_of_adapters_holds_when_many_are_made_at_once(
    ada: User, settings: Settings
) -> None:
    settings.MAX_ADAPTERS = 2
    results = at_once(*[create(ada, f"m{number}") for number in range(CLIENTS)])
    assert sum(isinstance(result, LimitExceeded) for result in results) == CLIENTS - 2
    assert Run.objects.count() == 2
