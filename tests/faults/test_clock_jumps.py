"""The wall clock jumps: nothing expires because of that, and no work is left waiting."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from django.contrib.auth.models import User
from django.db.models import F
from django.utils import timezone
from django_q.models import OrmQ

from futures.broker import PostgresBroker, doorbells_unlock
from futures.models import Future, Lane, Worker
from tests.conftest import InProcessWorker
from tests.faults.conftest import assert_all_ready
from training.models import Run, Session
from training.services.sessions import session_create
from training.worker import maintenance
from training.worker.maintenance import JUMP_SECONDS, SETTLE_SECONDS, Maintenance, SteadyClock

Train = Callable[..., list[Future]]

HOUR = 3600.0
YEAR = timedelta(days=365)


class Time:
    """A stopwatch, and two wall clocks that keep step with it until they are set."""

    def __init__(self) -> None:
        self.now = 50.0
        self.offsets = [1e9, 1e9]

    def stopwatch(self) -> float:
        return self.now

    def wall_clocks(self) -> tuple[float, ...]:
        return tuple(offset + self.now for offset in self.offsets)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def steady(time: Time) -> Callable[[], float]:
    """``steady()``: look at the clocks."""
    clock = SteadyClock(stopwatch=time.stopwatch)
    return lambda: clock.steady_seconds(*time.wall_clocks())


def test_clocks_that_keep_step_are_believed_more_and_more(
    time: Time, steady: Callable[[], float]
) -> None:
    assert steady() == 0
    for second in range(5, 100, 5):
        time.now += 5
        time.offsets[0] += 0.4  # a clock that is nudged back into time
        assert steady() == second


@pytest.mark.parametrize("which", [0, 1], ids=["of this machine", "of Postgres"])
@pytest.mark.parametrize("jump", [HOUR, -HOUR, JUMP_SECONDS + 1])
def test_a_jump_of_any_clock_begins_anew(
    time: Time, steady: Callable[[], float], which: int, jump: float
) -> None:
    steady()
    time.now += HOUR
    assert steady() == HOUR
    time.offsets[which] += jump
    time.now += 5
    assert steady() == 0
    time.now += 5
    assert steady() == 5


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The actions of maintenance because of an age."""
    done: list[str] = []
    for name in ("checkpoints_expire", "sessions_expire"):
        monkeypatch.setattr(maintenance, name, lambda name=name: done.append(name))
    return done


@pytest.fixture
def upkeep(time: Time, worker: Worker) -> Maintenance:
    return Maintenance(
        worker.queue,
        steady=SteadyClock(stopwatch=time.stopwatch),
        wall_clocks=time.wall_clocks,
    )


@pytest.fixture
def worker(work: InProcessWorker) -> Worker:
    return work.worker


@pytest.fixture
def waiting(owner: User, worker: Worker, train: Train, work: InProcessWorker) -> Future:
    """A request that waits for a number that has not arrived."""
    train("m")
    work()
    run = Run.objects.get()
    Future.objects.create(
        owner=owner,
        queue=worker.queue,
        lane=Lane.objects.get(pk=run.id),
        seq_id=run.applied_seq_id + 5,
        kind="forward",
        payload=b"",
        payload_digest=b"",
    )
    return Future.objects.get(kind="forward")


def test_a_jump_forward_ends_no_session_and_no_waiting(
    time: Time, upkeep: Maintenance, waiting: Future, owner: User
) -> None:
    session = session_create(owner_id=owner.pk, sdk_version="1")
    upkeep.do()
    time.now += SETTLE_SECONDS
    upkeep.do()

    # A year passes on the wall clocks: everything that was written down is a year older.
    time.offsets = [offset + YEAR.total_seconds() for offset in time.offsets]
    Future.objects.update(created_at=F("created_at") - YEAR)
    Session.objects.update(heartbeat_at=F("heartbeat_at") - YEAR)
    for _ in range(3):
        time.now += 5
        upkeep.do()
    session.refresh_from_db()
    waiting.refresh_from_db()
    assert session.finished_at is None
    assert waiting.state == "pending"

    # The client shows itself, the number still does not come.
    Session.objects.update(heartbeat_at=timezone.now())
    time.now += SETTLE_SECONDS
    upkeep.do()
    session.refresh_from_db()
    waiting.refresh_from_db()
    assert session.finished_at is None
    assert (waiting.state, waiting.error_code) == ("failed", "SeqIdMissing")


@pytest.mark.django_db
def test_a_server_that_was_off_gives_its_clients_time_to_show_themselves(
    time: Time, upkeep: Maintenance, calls: list[str]
) -> None:
    upkeep.do()
    time.now += SETTLE_SECONDS - 1
    upkeep.do()
    assert calls == []
    time.now += 1
    upkeep.do()
    assert calls == ["checkpoints_expire", "sessions_expire"]


def test_a_clock_set_back_leaves_no_doorbell_unheard(worker: Worker, train: Train) -> None:
    bell = PostgresBroker(list_key=worker.queue)
    train("m")
    OrmQ.objects.update(lock=timezone.now() + timedelta(hours=1))
    assert bell.claim() == []
    doorbells_unlock(worker.queue)
    assert bell.claim() != []


def test_another_queues_tasks_keep_their_time(worker: Worker) -> None:
    later = timezone.now() + timedelta(hours=1)
    OrmQ.objects.create(key="another", payload="", lock=later)
    doorbells_unlock(worker.queue)
    assert OrmQ.objects.get(key="another").lock == later


@pytest.mark.parametrize("shift", [timedelta(days=1), -timedelta(days=1)], ids=["future", "past"])
def test_work_is_done_in_order_whatever_the_clock_said_when_it_came(
    work: InProcessWorker, train: Train, shift: timedelta
) -> None:
    futures = train("m", 2)
    Future.objects.filter(pk__in=[future.pk for future in futures[:2]]).update(
        created_at=F("created_at") + shift
    )
    work()
    assert_all_ready(futures)
