"""prunefutures and replayfuture."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from django.db.models import QuerySet
from django.utils import timezone

from futures.cancelling import future_cancel
from futures.claiming import future_claim
from futures.models import Future, Worker
from futures.payload import decode, encode
from tests.futures.conftest import SubmitFactory, finish


def call(command: str, *args: str) -> str:
    out = StringIO()
    call_command(command, *args, stdout=out, stderr=out)
    return out.getvalue()


@pytest.fixture
def finished(submit: SubmitFactory, worker: Worker) -> Callable[..., Future]:
    def make(days: int, **fields: Any) -> Future:
        submit(**fields)
        [future] = future_claim(worker=worker, max_futures=1, max_cost=1)
        finish(worker, future)
        Future.objects.filter(pk=future.pk).update(
            finished_at=timezone.now() - timedelta(days=days)
        )
        return future

    return make


def bodies(future: Future) -> int:
    row = Future.objects.get(pk=future.pk)
    assert (row.pruned_at is None) == (row.payload is not None)
    return (row.payload is not None) + (row.result is not None)


@pytest.mark.django_db
def test_pruning_drops_old_bodies_and_keeps_rows(
    finished: Callable[..., Future], submit: SubmitFactory
) -> None:
    old, young = finished(8), finished(6)
    waiting = submit()
    Future.objects.filter(pk=waiting.pk).update(created_at=timezone.now() - timedelta(days=99))

    assert call("prunefutures", "--days", "7", "--dry-run") == "1 futures would be pruned.\n"
    assert bodies(old) == 2
    assert call("prunefutures", "--days", "7") == "1 futures pruned.\n"

    assert [bodies(future) for future in (old, young, waiting)] == [0, 2, 1]
    assert Future.objects.get(pk=old.pk).state == "ready"
    assert call("prunefutures", "--days", "7") == "0 futures pruned.\n"


@pytest.mark.django_db
def test_pruning_goes_through_more_than_one_batch(
    finished: Callable[..., Future], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("futures.management.commands.prunefutures._BATCH", 2)
    for _ in range(5):
        finished(8)

    assert call("prunefutures", "--days", "7") == "5 futures pruned.\n"


@pytest.mark.django_db
def test_the_age_comes_from_the_settings(finished: Callable[..., Future], settings: Any) -> None:
    finished(settings.KEEP_RESULTS_DAYS - 1)
    finished(settings.KEEP_RESULTS_DAYS + 1)

    assert call("prunefutures") == "1 futures pruned.\n"


def keep_sums(prunable: QuerySet[Future]) -> QuerySet[Future]:
    return prunable.exclude(kind="sum")


@pytest.mark.django_db
def test_what_the_project_needs_for_replay_is_kept(
    finished: Callable[..., Future], settings: Any
) -> None:
    settings.FUTURES_PRUNABLE = f"{__name__}.keep_sums"
    needed, free = finished(8, kind="sum"), finished(8, kind="sample")

    assert call("prunefutures", "--days", "7") == "1 futures pruned.\n"
    assert (bodies(needed), bodies(free)) == (2, 0)


@pytest.mark.django_db
@pytest.mark.parametrize("days", ["-1", "99999999999"])
def test_an_age_that_no_future_can_have_is_refused(days: str) -> None:
    with pytest.raises(CommandError, match=f"--days: expected 0 to 36500, got {days}"):
        call("prunefutures", "--days", days)


@pytest.mark.django_db
def test_replaying_submits_again_and_prints_the_new_id(submit: SubmitFactory) -> None:
    first = submit()

    printed = call("replayfuture", first.pk)

    replay = Future.objects.get(replay_of=first)
    assert printed == f"{first.pk} -> {replay.pk}\n"


@pytest.mark.django_db
def test_replaying_what_cannot_be_replayed_fails_after_the_rest(submit: SubmitFactory) -> None:
    first = submit()

    with pytest.raises(CommandError, match="1 of 2 failed"):
        call("replayfuture", "future_unknown", first.pk)
    assert Future.objects.filter(replay_of=first).exists()


class Adding:
    """A worker in a thread that answers each pending future with a function of its payload."""

    def __init__(self, worker: Worker, answer: Callable[[Any], dict[str, Any]]) -> None:
        self._worker = worker
        self._answer = answer
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(0.02):
            for future in future_claim(worker=self._worker, max_futures=9, max_cost=9):
                finish(self._worker, future, **self._answer(decode(bytes(future.payload))))
        connections.close_all()


def value_of(kind: str, data: bytes) -> Any:
    """A result as plain values, as the project makes it."""
    return decode(data)


def add(payload: Any) -> dict[str, Any]:
    return {"result": encode({"sum": payload["number"] + 1})}


@pytest.mark.django_db(transaction=True)
def test_a_replay_is_waited_for_and_compared_with_the_first(
    finished: Callable[..., Future], worker: Worker, settings: Any
) -> None:
    settings.FUTURES_RESULT_VALUE = f"{__name__}.value_of"
    same, different = finished(1, payload={"number": 1}), finished(1, payload={"number": 5})

    with Adding(worker, add):
        printed = call("replayfuture", "--wait", "--timeout", "120", same.pk, different.pk)

    lines = printed.splitlines()
    assert lines[2].endswith(": same result.")
    assert lines[3].endswith(": different result.")


@pytest.mark.django_db(transaction=True)
def test_a_replay_that_fails_fails_the_command(
    finished: Callable[..., Future], worker: Worker
) -> None:
    first = finished(1)

    with (
        Adding(worker, lambda payload: {"error": "no memory", "category": "server"}),
        pytest.raises(CommandError, match="1 of 1 failed"),
    ):
        call("replayfuture", "--wait", "--timeout", "120", first.pk)


@pytest.mark.django_db(transaction=True)
def test_a_replay_that_nobody_runs_fails_the_command(submit: SubmitFactory) -> None:
    first = submit()

    with pytest.raises(CommandError, match="1 of 1 failed"):
        call("replayfuture", "--wait", "--timeout", "0.05", first.pk)


@pytest.mark.django_db(transaction=True)
def test_a_replay_without_a_first_result_is_ready_all_the_same(
    submit: SubmitFactory, worker: Worker
) -> None:
    first = submit()
    future_cancel(request_id=first.pk, owner_id=first.owner_id)

    with Adding(worker, add):
        printed = call("replayfuture", "--wait", "--timeout", "120", first.pk)

    assert "no result to compare with" in printed
