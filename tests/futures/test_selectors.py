"""Reads for owners."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from futures.claiming import future_claim
from futures.errors import FutureNotFound, FuturePurged
from futures.models import Future, Worker
from futures.selectors import future_get, queue_state
from futures.workers import worker_live, worker_stop
from tests.futures.conftest import QUEUE, SubmitFactory, finish

pytestmark = pytest.mark.django_db


def test_the_owner_gets_the_future_without_its_bodies(submit: SubmitFactory) -> None:
    future = submit()

    got = future_get(request_id=future.pk, owner_id=future.owner_id)

    assert got == future
    assert got.get_deferred_fields() == {"payload", "result"}


def test_anothers_future_is_as_if_it_did_not_exist(
    submit: SubmitFactory, owner_factory: Callable[[], Any]
) -> None:
    future = submit()

    with pytest.raises(FutureNotFound) as anothers:
        future_get(request_id=future.pk, owner_id=owner_factory().pk)
    with pytest.raises(FutureNotFound) as unknown:
        future_get(request_id="future_unknown", owner_id=future.owner_id)
    assert str(anothers.value).replace(future.pk, "future_unknown") == str(unknown.value)


def test_a_pruned_result_is_gone_for_those_who_want_it(
    submit: SubmitFactory, worker: Worker
) -> None:
    submit()
    [future] = future_claim(worker=worker, max_futures=1, max_cost=1)
    finish(worker, future, result=b"r")
    got = future_get(request_id=future.pk, owner_id=future.owner_id, with_result=True)
    assert bytes(got.result) == b"r"

    Future.objects.update(payload=None, result=None, pruned_at=timezone.now())

    assert future_get(request_id=future.pk, owner_id=future.owner_id).state == "ready"
    with pytest.raises(FuturePurged):
        future_get(request_id=future.pk, owner_id=future.owner_id, with_result=True)


def test_a_queue_is_active_while_its_worker_beats(worker_factory: Callable[..., Worker]) -> None:
    assert queue_state(QUEUE).state == "paused_capacity"
    assert "No worker" in queue_state(QUEUE).reason

    worker = worker_factory()
    assert "starting" in queue_state(QUEUE).reason

    worker_live(worker, {})
    assert (queue_state(QUEUE).state, queue_state(QUEUE).reason) == ("active", "")

    Worker.objects.update(heartbeat_at=timezone.now() - timedelta(seconds=31))
    assert queue_state(QUEUE).state == "paused_capacity"
    assert "does not answer" in queue_state(QUEUE).reason

    worker_stop(worker)
    assert "No worker" in queue_state(QUEUE).reason
