"""``prunefutures`` deletes old payloads, except those that rebuilding a run may need."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from django.core.management import call_command
from django.utils import timezone

from futures.models import Future
from tests.conftest import InProcessWorker
from training.models import Run
from training.services import run_remove_submit

Submit = Callable[..., Future]


@pytest.fixture
def prune_everything() -> Callable[[], None]:
    """Make all futures old, then prune."""

    def prune() -> None:
        Future.objects.update(finished_at=timezone.now() - timedelta(days=90))
        call_command("prunefutures")

    return prune


def kinds_with_payload() -> list[str]:
    kept = Future.objects.filter(payload__isnull=False).order_by("seq_id")
    return list(kept.values_list("kind", flat=True))


def test_a_run_without_snapshot_keeps_its_whole_log(
    work: InProcessWorker,
    forward_backward: Submit,
    optim_step: Submit,
    prune_everything: Callable[[], None],
) -> None:
    forward_backward("m", "hi")
    optim_step("m")
    work()
    prune_everything()
    assert kinds_with_payload() == ["create_run", "forward_backward", "optim_step"]


def test_one_snapshot_covers_nothing_for_it_may_be_unreadable(
    work: InProcessWorker, forward_backward: Submit, prune_everything: Callable[[], None]
) -> None:
    forward_backward("m", "hi")
    work()
    work.loop.give_back()
    prune_everything()
    assert kinds_with_payload() == ["create_run", "forward_backward"]


def test_what_the_older_of_two_snapshots_covers_is_dropped(
    work: InProcessWorker,
    forward_backward: Submit,
    optim_step: Submit,
    prune_everything: Callable[[], None],
) -> None:
    for _ in range(2):
        forward_backward("m", "hi")
        work()
        work.loop.give_back()
    optim_step("m")
    work()
    prune_everything()
    assert kinds_with_payload() == ["forward_backward", "optim_step"]
    assert Future.objects.filter(pruned_at__isnull=True, payload=None).count() == 0


def test_a_removed_run_keeps_nothing(
    work: InProcessWorker, forward_backward: Submit, prune_everything: Callable[[], None]
) -> None:
    forward_backward("m", "hi")
    run_remove_submit(owner_id=Run.objects.get().owner_id, model_id="m")
    work()
    prune_everything()
    assert kinds_with_payload() == []
