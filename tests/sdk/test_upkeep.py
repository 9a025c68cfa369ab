"""What a clock starts: the worker's heartbeat thread looks after numbers and sessions."""

from __future__ import annotations

from datetime import timedelta

from django.conf import LazySettings
from django.utils import timezone

from futures.models import Future
from tests.conftest import ApiClient
from tests.sdk.conftest import SdkClient
from training.models import Session
from training.worker import process


class OneBeat:
    """An event that lets one beat pass."""

    def __init__(self) -> None:
        self.asked = 0

    def wait(self, seconds: float) -> bool:
        self.asked += 1
        return self.asked > 1


def test_a_beat_fails_who_waits_for_nothing_and_finishes_who_is_gone(
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
    [worker] = process.Worker.objects.filter(state="starting")

    process._beat(worker, {}, OneBeat())  # type: ignore[arg-type]  # all it asks of an event

    assert sdk.result(waiting) == {
        "error": "This request waited for seq_id 2, which never arrived.",
        "category": "user",
    }
    assert Session.objects.get(pk=gone).finish_reason == "interrupted"
    assert Session.objects.get(pk=session_id).finished_at is None
