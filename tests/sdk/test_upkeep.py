"""Timed maintenance: the worker handles missing numbers and silent sessions."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.conf import LazySettings
from django.utils import timezone

from futures.models import Future
from tests.base_models import base_model_configs
from tests.conftest import ApiClient
from tests.sdk.conftest import SdkClient
from training.models import Session
from training.services.sessions import sessions_expire
from training.worker import process
from training.worker.maintenance import SETTLE_SECONDS, Maintenance, SteadyClock


def test_maintenance_fail_who_waits_for_nothing_and_finish_who_is_gone(
    served_api: ApiClient, settings: LazySettings
) -> None:
    settings.GAP_SECONDS = 60
    sdk = SdkClient.with_new_key(served_api)
    session_id = sdk.session()
    model_id = sdk.model(session_id)
    sdk.result(sdk.optim_step(model_id, 1))
    waiting = sdk.optim_step(model_id, 3)
    future = Future.objects.filter(pk=waiting.json()["request_id"])
    future.update(created_at=timezone.now() - timedelta(seconds=61))
    gone = sdk.session()
    Session.objects.filter(pk=gone).update(heartbeat_at=timezone.now() - timedelta(days=8))
    seconds = iter([0.0, SETTLE_SECONDS])
    maintenance = Maintenance(
        future.get().queue,
        steady=SteadyClock(stopwatch=lambda: next(seconds)),
        wall_clocks=lambda: (),
    )

    maintenance.do()
    assert future.get().state == "pending"
    maintenance.do()

    assert sdk.result(waiting) == {
        "error": "This request waited for seq_id 2, which never arrived.",
        "category": "user",
    }
    assert Session.objects.get(pk=gone).finish_reason == "interrupted"
    assert Session.objects.get(pk=session_id).finished_at is None


def test_a_session_ends_whatever_waits_and_whether_or_not_its_model_is_served(
    sdk: SdkClient, settings: LazySettings
) -> None:
    session_id = sdk.session()
    model_id = sdk.model(session_id)
    Session.objects.filter(pk=session_id).update(heartbeat_at=timezone.now() - timedelta(days=8))
    settings.MAX_PENDING = 1
    settings.BASE_MODELS = base_model_configs("another")

    assert sessions_expire() == 1

    removal = Future.objects.get(kind="remove_run")
    # No worker will come for it, and it needs none.
    assert (removal.lane_id, removal.state) == (model_id, "ready")


def test_maintenance_that_fails_leaves_the_heartbeat_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Maintenance):
        def do(self) -> None:
            raise ValueError("what nobody thought of")

    process._do(Broken("queue"))

    assert "what nobody thought of" in caplog.text
