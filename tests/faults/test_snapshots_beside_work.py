"""Snapshots are written beside the work: no request waits for one, and no failure affects
requests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from pytest_django import Settings

from futures.models import Future
from tests.conftest import InProcessWorker
from tests.faults.conftest import Disk, assert_all_ready, assert_same, state_of
from tests.training.test_worker import sample
from tests.waiting import LONG_SECONDS
from training import services
from training.engine.fake.engine import fake_engine
from training.engine.fake.trainer import ADAPTER_BYTES
from training.models import Run, Snapshot
from training.paths import TinkerPath
from training.services.removal import submit_removal
from training.services.upkeep import checkpoint_remove
from training.worker import snapshot_schedule

Start = Callable[..., InProcessWorker]
Train = Callable[..., list[Future]]
Files = Callable[[str], list[Path]]


@pytest.fixture(autouse=True)
def _always_due(settings: Settings, monkeypatch: pytest.MonkeyPatch, files: Files) -> None:
    """Any work is worth a snapshot."""
    settings.SNAPSHOT_SECONDS = 0
    monkeypatch.setattr(snapshot_schedule, "WRITE_COST_FACTOR", 0)


class SlowDisk:
    """An engine's ``before_verb`` that holds every write until the test lets it go."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []
        """Run id, and the request up to which it was captured."""
        self.go = threading.Event()

    def __call__(self, verb: str, adapter_names: tuple[str, ...]) -> None:
        if verb == "capture_adapter":
            self.begun += Run.objects.filter(id__in=adapter_names).values_list(
                "id", "applied_seq_id"
            )
        elif verb == "save_adapter":
            assert self.go.wait(LONG_SECONDS)


@pytest.fixture
def slow() -> Iterator[SlowDisk]:
    slow = SlowDisk()
    yield slow
    slow.go.set()


PATH = "tinker://m/weights/kept"


def save(owner: User, name: str) -> Future:
    return services.save_weights_submit(
        owner_id=owner.pk, model_id=name, name="kept", kind="training"
    ).future


def load(owner: User, name: str) -> Future:
    return services.load_weights_submit(owner_id=owner.pk, model_id=name, path=PATH).future


def let_it_finish(worker: InProcessWorker) -> None:
    """The disk is done, and the worker takes its next turn."""
    worker.loop.adapter_cache.settle()
    worker.loop.turn()


def test_a_run_trains_on_while_its_snapshot_is_written(
    start_worker: Start, train: Train, slow: SlowDisk
) -> None:
    work = start_worker(fake_engine(before_verb=slow))
    train("m", 1)
    work()
    work.loop.turn()
    [begun] = slow.begun

    later = train("m", 2, first=1)
    work()
    assert_all_ready(later)
    assert not Snapshot.objects.exists()
    before = state_of(work, "m")

    slow.go.set()
    let_it_finish(work)
    [snapshot] = Snapshot.objects.all()
    assert (snapshot.run_id, snapshot.seq_id) == begun
    assert snapshot.seq_id < Run.objects.get().applied_seq_id
    work.die()
    assert_same(state_of(start_worker(), "m"), before)


def test_one_snapshot_is_written_at_a_time_and_the_next_one_follows(
    start_worker: Start, train: Train, slow: SlowDisk
) -> None:
    work = start_worker(fake_engine(before_verb=slow))
    for name in ("a", "b"):
        train(name, 2)
    work()
    work.loop.turn()
    assert len(slow.begun) == 1
    slow.go.set()
    for _ in range(3):
        let_it_finish(work)
    assert set(Run.objects.values_list("id", "applied_seq_id")) <= set(slow.begun)
    assert set(slow.begun) == set(Snapshot.objects.values_list("run_id", "seq_id"))


def test_a_stop_waits_for_the_snapshot_that_is_being_written(
    start_worker: Start, train: Train, slow: SlowDisk
) -> None:
    work = start_worker(fake_engine(before_verb=slow))
    train("m", 1)
    work()
    work.loop.turn()
    threading.Timer(0.05, slow.go.set).start()
    work.loop.give_back()
    assert Snapshot.objects.order_by("-seq_id")[0].seq_id == Run.objects.get().applied_seq_id


def test_the_snapshot_of_a_run_that_was_removed_meanwhile_is_deleted(
    start_worker: Start, train: Train, slow: SlowDisk, files: Files, owner: User
) -> None:
    work = start_worker(fake_engine(before_verb=slow))
    train("m", 1)
    work()
    work.loop.turn()
    services.run_remove_submit(owner_id=owner.pk, model_id="m")
    work()
    slow.go.set()
    let_it_finish(work)
    assert not Snapshot.objects.exists()
    assert files("snapshots") == []


def test_so_is_that_of_a_run_whose_session_ended_and_which_stays_in_lists(
    start_worker: Start, train: Train, slow: SlowDisk, files: Files
) -> None:
    work = start_worker(fake_engine(before_verb=slow))
    train("m", 1)
    work()
    work.loop.turn()
    submit_removal(Run.objects.get())
    work()
    slow.go.set()
    let_it_finish(work)
    assert Run.objects.live().exists()
    assert not Snapshot.objects.exists()
    assert files("snapshots") == []


def test_a_full_disk_fails_no_step_and_the_snapshot_comes_later(
    start_worker: Start,
    train: Train,
    disk: Disk,
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(snapshot_schedule, "PAUSE_SECONDS", 0.0)
    work = start_worker()
    disk.fail()
    futures = train("m", 3)
    work()
    let_it_finish(work)
    work.loop.adapter_cache.snapshot_all()  # as at its end
    assert_all_ready(futures)
    assert not Snapshot.objects.exists()
    assert files("snapshots") == []
    assert "disk is full" in caplog.text

    disk.recover()
    let_it_finish(work)
    let_it_finish(work)
    assert Snapshot.objects.get().seq_id == Run.objects.get().applied_seq_id


def test_after_a_failure_the_disk_is_left_alone_for_a_while(
    start_worker: Start, train: Train, disk: Disk
) -> None:
    captured: list[str] = []
    engine = fake_engine(
        before_verb=lambda verb, names: captured.append(verb) if "capture" in verb else None
    )
    work = start_worker(engine)
    disk.fail()
    train("m", 1)
    work()
    let_it_finish(work)
    train("m", 3, first=1)
    work()
    let_it_finish(work)
    assert len(captured) == 1


def test_on_a_full_disk_adapters_still_make_room_for_each_other(
    start_worker: Start, train: Train, disk: Disk
) -> None:
    unbroken = start_worker()
    train("one", 2)
    unbroken()
    expected = state_of(unbroken, "one")

    work = start_worker(fake_engine(adapter_bytes=ADAPTER_BYTES))
    disk.fail()
    for first in (0, 1):
        for name in ("a", "b"):
            futures = train(name, 1, first=first)
            work()
            assert_all_ready(futures)
    assert len(work.engine.trainer.adapter_names()) == 1
    for name in ("a", "b"):
        assert_same(state_of(work, name), expected)


def test_a_loaded_checkpoint_is_in_a_snapshot_before_it_can_be_missed(
    start_worker: Start, train: Train, owner: User
) -> None:
    work = start_worker()
    train("m", 2)
    save(owner, "m")
    work()
    loaded = load(owner, "m")
    work()
    work.loop.turn()
    assert Snapshot.objects.order_by("-seq_id")[0].seq_id == loaded.seq_id


def test_what_only_a_deleted_checkpoint_could_rebuild_stays_in_memory(
    start_worker: Start, train: Train, disk: Disk, owner: User
) -> None:
    work = start_worker(fake_engine(adapter_bytes=2 * ADAPTER_BYTES))
    train("m", 2)
    save(owner, "m")
    train("m", 1, first=2)
    work()
    disk.fail()
    load(owner, "m")
    work()
    for name in ("a", "b"):
        train(name, 1)
        work()
    checkpoint_remove(owner_id=owner.pk, path=TinkerPath.parse(PATH))
    assert Run.objects.get(name="m").id in work.engine.trainer.adapter_names()
    futures = train("m", 1, first=3)
    work()
    assert_all_ready(futures)


def test_a_sample_for_which_nothing_can_leave_fails_instead_of_waiting_for_ever(
    start_worker: Start, train: Train, disk: Disk, owner: User
) -> None:
    work = start_worker(fake_engine(adapter_bytes=ADAPTER_BYTES))
    train("m", 2)
    save(owner, "m")
    work()
    disk.fail()
    load(owner, "m")  # with no snapshot, only the checkpoint could rebuild it
    work()
    future = sample(owner, model_path=PATH).future
    work()
    future.refresh_from_db()
    assert (future.state, future.error_code) == ("failed", "OutOfMemory")
    assert "no room" in future.error
