"""The life of a worker, and the recovery by the next one."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import psycopg
import pytest
from django.db import OperationalError
from django.utils import timezone
from django_q.models import OrmQ

from futures import workers
from futures.broker import PostgresBroker
from futures.claiming import SUSPECT_INTERRUPTIONS, future_claim
from futures.database import dedicated_parameters
from futures.errors import Fenced, QueueTaken
from futures.lost_workers import (
    MAX_ATTEMPTS,
    MAX_INTERRUPTIONS,
    crash_assumed,
    worker_ended,
    workers_reap,
)
from futures.models import Future, Lane, Worker
from futures.selectors import queue_state
from futures.transitions import State
from futures.worker_lock import WorkerLock
from futures.workers import (
    worker_heartbeat,
    worker_live,
    worker_start,
    worker_stop,
)
from tests.futures.conftest import QUEUE, SubmitFactory, finish, kill, race
from tests.waiting import wait_for

pytestmark = pytest.mark.django_db


def claim(worker: Worker) -> list[Future]:
    return future_claim(worker=worker, max_futures=10, max_cost=10)


def test_a_worker_starts_goes_live_beats_and_stops(worker: Worker) -> None:
    assert Worker.objects.get(pk=worker.pk).state == "starting"

    worker_live(worker, {"device": "cpu"})
    row = Worker.objects.get(pk=worker.pk)
    assert (row.state, row.figures) == ("live", {"device": "cpu"})

    Worker.objects.update(heartbeat_at=timezone.now() - timedelta(hours=1))
    worker_heartbeat(worker, {"device": "cpu", "adapters": 2})
    row = Worker.objects.get(pk=worker.pk)
    assert row.heartbeat_at > timezone.now() - timedelta(minutes=1)
    assert row.figures["adapters"] == 2

    worker_stop(worker)
    row = Worker.objects.get(pk=worker.pk)
    assert row.state == "stopped"
    assert row.stopped_at is not None


def test_a_queue_may_have_several_workers_and_the_former_versions_worker_none_beside_it(
    worker_factory: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("futures.worker_lock._PATIENCE_SECONDS", 0.05)
    first, second = worker_factory(), worker_factory()
    assert second.pk > first.pk
    assert set(Worker.objects.values_list("state", flat=True)) == {"starting"}

    with psycopg.connect(**dedicated_parameters()) as former:
        take = "SELECT pg_try_advisory_lock(hashtextextended('futures queue ' || %s, 0))"
        assert former.execute(take, [QUEUE]).fetchone() == (False,)
        worker_stop(first)
        worker_stop(second)
        assert wait_for(lambda: former.execute(take, [QUEUE]).fetchone() == (True,))

        with pytest.raises(QueueTaken):
            worker_factory()
        worker_factory("another queue")


def test_what_a_dead_worker_held_waits_again_with_one_attempt_more(
    submit: SubmitFactory, lane: Lane, worker_factory: Callable[..., Worker]
) -> None:
    dead = worker_factory()
    for _ in range(3):
        submit(lane)
    running = claim(dead)
    finish(dead, running[0])
    PostgresBroker(list_key=QUEUE).claim()
    kill(dead)

    successor = worker_factory()

    rows = [Future.objects.get(pk=future.pk) for future in running]
    assert [row.state for row in rows] == ["ready", "pending", "pending"]
    assert [row.attempts for row in rows] == [0, 1, 1]
    dead.refresh_from_db()
    assert dead.state == "lost"
    assert OrmQ.objects.filter(key=QUEUE).count() == 1
    assert len(PostgresBroker(list_key=QUEUE).claim()) == 1
    alone = claim(successor)
    assert [future.seq_id for future in alone] == [2]
    finish(successor, *alone)
    assert [future.seq_id for future in claim(successor)] == [3]


def test_the_third_crash_fails_a_future_by_name_and_its_lane_goes_on(
    submit: SubmitFactory, lane: Lane, worker_factory: Callable[..., Worker]
) -> None:
    deadly = submit(lane)
    submit(lane)
    for _ in range(3):
        worker = worker_factory()
        assert deadly.pk in [future.pk for future in claim(worker)]
        kill(worker)

    worker = worker_factory()

    row = Future.objects.get(pk=deadly.pk)
    assert (row.state, row.category, row.error_code) == ("failed", "server", "CrashedWorker")
    assert "3 times" in row.error
    assert (row.attempts, row.finished_at is not None) == (3, True)
    assert [future.seq_id for future in claim(worker)] == [2]


def test_ends_of_workers_that_held_others_too_fail_nothing(
    submit: SubmitFactory, lane_factory: Callable[..., Lane], worker_factory: Callable[..., Worker]
) -> None:
    futures = [submit(lane_factory()) for _ in range(2)]
    ends = 2 * MAX_ATTEMPTS
    for _ in range(ends):
        worker = worker_factory()
        # As if both were claimed before either was suspected.
        Future.objects.update(state="running", worker=worker, started_at=timezone.now())
        kill(worker)
    worker_factory()

    rows = Future.objects.filter(pk__in=[future.pk for future in futures])
    assert set(rows.values_list("state", "attempts")) == {("pending", ends)}


def test_a_worker_ended_from_outside_speaks_against_its_future_only_in_the_long_run(
    submit: SubmitFactory, lane: Lane
) -> None:
    future = submit(lane)
    states = []
    for _ in range(MAX_INTERRUPTIONS + 1):
        worker = worker_start(queue=QUEUE, figures={}, crashed=lambda before: False)
        future.refresh_from_db()
        states.append(future.state)
        claim(worker)
        kill(worker)

    assert states == ["pending"] * MAX_INTERRUPTIONS + ["failed"]
    assert f"{MAX_INTERRUPTIONS} times" in future.error
    assert (future.attempts, future.interruptions) == (0, MAX_INTERRUPTIONS)


def test_what_ran_when_a_worker_was_ended_from_outside_is_no_suspect_at_first(
    submit: SubmitFactory, lane_factory: Callable[..., Lane]
) -> None:
    futures = [submit(lane_factory()) for _ in range(2)]
    claimed = []
    for _ in range(SUSPECT_INTERRUPTIONS + 1):
        worker = worker_start(queue=QUEUE, figures={}, crashed=lambda before: False)
        claimed.append(len(claim(worker)))
        kill(worker)

    assert claimed == [len(futures)] * SUSPECT_INTERRUPTIONS + [1]


def test_the_next_worker_judges_the_dead_one_and_no_other(
    submit: SubmitFactory, worker_factory: Callable[..., Worker]
) -> None:
    worker_stop(worker_factory())
    dead = worker_factory()
    kill(worker_factory("another queue"))
    kill(dead)
    asked: list[int] = []

    def judge(before: Worker) -> bool:
        asked.append(before.pk)
        return True

    kill(worker_start(queue=QUEUE, figures={}, crashed=judge))
    assert asked == [dead.pk]


def test_a_stopping_worker_gives_back_what_it_holds_without_blame(
    submit: SubmitFactory, lane: Lane, worker_factory: Callable[..., Worker]
) -> None:
    worker = worker_factory()
    submit(lane)
    submit(lane)
    claim(worker)

    worker_stop(worker)

    assert set(Future.objects.values_list("state", "attempts")) == {("pending", 0)}
    assert [future.seq_id for future in claim(worker_factory())] == [1, 2]


def test_a_replaced_worker_is_fenced_everywhere(
    submit: SubmitFactory, worker_factory: Callable[..., Worker]
) -> None:
    old = worker_factory()
    submit()
    running = claim(old)
    kill(old)
    new = worker_factory()
    [rerun] = claim(new)

    with pytest.raises(Fenced):
        finish(old, *running)
    with pytest.raises(Fenced):
        claim(old)
    with pytest.raises(Fenced):
        worker_heartbeat(old, {})
    with pytest.raises(Fenced):
        worker_live(old, {})
    worker_stop(old)
    assert Worker.objects.get(pk=old.pk).state == "lost"
    assert Future.objects.get(pk=rerun.pk).worker_id == new.pk
    finish(new, rerun)
    assert Future.objects.get(pk=rerun.pk).state == State.READY


def lock_holders() -> list[int]:
    """Backends that hold an advisory lock in this database."""
    with psycopg.connect(**dedicated_parameters()) as connection:
        rows = connection.execute(
            "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND database = "
            "(SELECT oid FROM pg_database WHERE datname = current_database())"
        ).fetchall()
        return [pid for (pid,) in rows]


def terminate(pid: int) -> None:
    """End a backend, and wait until it has ended."""
    with psycopg.connect(**dedicated_parameters()) as connection:
        connection.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])


def test_a_lost_lock_is_taken_again_by_the_heartbeat(worker: Worker) -> None:
    [pid] = set(lock_holders())
    terminate(pid)
    assert lock_holders() == []

    worker_heartbeat(worker, {})

    [renewed] = set(lock_holders())
    assert renewed != pid


def test_a_lock_lost_to_another_process_fences(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("futures.worker_lock._PATIENCE_SECONDS", 0.05)
    [pid] = set(lock_holders())
    terminate(pid)
    thief = WorkerLock(QUEUE, worker.pk)

    with pytest.raises(Fenced):
        worker_heartbeat(worker, {})
    thief.release()


def test_a_lock_that_cannot_be_asked_for_is_a_database_error(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    [pid] = set(lock_holders())
    terminate(pid)
    nowhere = {**dedicated_parameters(), "host": "/nonexistent"}
    monkeypatch.setattr("futures.worker_lock.dedicated_parameters", lambda: nowhere)

    with pytest.raises(OperationalError):
        worker_heartbeat(worker, {})


def test_a_start_that_fails_lets_the_lock_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(queue: str) -> None:
        raise RuntimeError("no task")

    monkeypatch.setattr(workers, "doorbell", fail)
    with pytest.raises(RuntimeError):
        worker_start(queue=QUEUE, figures={})
    assert lock_holders() == []


def ended(pid: int, judge: Callable[[Worker], bool] = crash_assumed) -> bool:
    """What the supervisor of a process of this machine says when it has ended."""
    return worker_ended(queue=QUEUE, pid=pid, crashed=judge)


@pytest.mark.django_db(transaction=True)
def test_a_dead_workers_row_says_so_before_the_next_one_starts(
    worker_factory: Callable[..., Worker],
) -> None:
    dead = worker_factory()
    worker_live(dead, {})
    kill(dead)

    assert wait_for(lambda: ended(dead.pid))

    row = Worker.objects.get(pk=dead.pk)
    assert (row.state, row.stopped_at is not None) == ("lost", True)
    reason = "The worker has ended; its requests wait for the next one."
    assert (queue_state(QUEUE).state, queue_state(QUEUE).reason) == ("paused_capacity", reason)
    with pytest.raises(Fenced):
        worker_heartbeat(dead, {})


def test_a_worker_that_holds_its_lock_is_never_ended_by_a_supervisor(worker: Worker) -> None:
    worker_live(worker, {})

    assert not ended(worker.pid)
    workers_reap(queue=QUEUE, crashed=crash_assumed)

    worker_heartbeat(worker, {})
    assert queue_state(QUEUE).state == "active"


@pytest.mark.parametrize("other", [{"pid": 1}, {"hostname": "elsewhere"}])
def test_another_supervisors_worker_is_left_alone_also_while_it_lost_its_lock(
    worker: Worker, other: dict[str, object]
) -> None:
    """Its connection went, with Postgres say; its next heartbeat takes the lock again."""
    pid = worker.pid
    Worker.objects.filter(pk=worker.pk).update(**other)
    kill(worker)

    assert ended(pid)
    workers_reap(queue=QUEUE, crashed=crash_assumed)

    worker_heartbeat(worker, {})


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("does_crash", [True, False])
def test_what_an_ended_worker_held_is_judged_and_waits_again_at_once(
    submit: SubmitFactory, worker_factory: Callable[..., Worker], does_crash: bool
) -> None:
    future = submit()
    dead = worker_factory()
    claim(dead)
    kill(dead)
    judged: list[int] = []

    def judge(before: Worker) -> bool:
        judged.append(before.pk)
        return does_crash

    wait_for(lambda: ended(dead.pid, judge))

    assert set(judged) == {dead.pk}
    row = Future.objects.get(pk=future.pk)
    assert (row.state, row.attempts, row.interruptions) == (
        State.PENDING,
        int(does_crash),
        int(not does_crash),
    )


@pytest.mark.django_db(transaction=True)
def test_a_successor_that_starts_meanwhile_is_not_taken_for_the_dead_one(
    worker_factory: Callable[..., Worker],
) -> None:
    for _ in range(5):
        dead = worker_factory()
        kill(dead)

        def successor(queue: str = QUEUE) -> Worker:
            worker = worker_factory(queue)
            worker_live(worker, {})
            return worker

        # The successor is of this very process, so only the lock tells it from the dead one.
        _, started = race(lambda: ended(os.getpid()), successor)

        assert isinstance(started, Worker), started
        assert Worker.objects.get(pk=started.pk).state == "live"
        assert Worker.objects.get(pk=dead.pk).state == "lost"
        worker_stop(started)
