"""Snapshots that cannot be read: the one before and a longer replay give the same bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_django import Settings

from futures.models import Future
from tests.conftest import InProcessWorker
from tests.faults.conftest import assert_all_ready, assert_same, state_of
from training.engine.fake.engine import fake_engine
from training.models import Run, Snapshot

Start = Callable[..., InProcessWorker]
Train = Callable[..., list[Future]]


def flip_a_bit(folder: Path) -> None:
    path = folder / "exp_avg.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def cut_short(folder: Path) -> None:
    path = folder / "weights.npy"
    path.write_bytes(path.read_bytes()[:-100])


def change_the_step(folder: Path) -> None:
    path = folder / "meta.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 5'))


def empty_the_meta_file(folder: Path) -> None:
    (folder / "meta.json").write_bytes(b"")


def make_the_meta_file_another(folder: Path) -> None:
    (folder / "meta.json").write_text("[]")


def lose_a_file(folder: Path) -> None:
    (folder / "grad.npy").unlink()


def put_a_folder_for_a_file(folder: Path) -> None:
    (folder / "weights.npy").unlink()
    (folder / "weights.npy").mkdir()


DAMAGES = [
    flip_a_bit,
    cut_short,
    change_the_step,
    empty_the_meta_file,
    make_the_meta_file_another,
    lose_a_file,
    put_a_folder_for_a_file,
    shutil.rmtree,
]


@pytest.fixture
def snapshots(start_worker: Start, train: Train, files: object, settings: Settings) -> list[Path]:
    """Folders of a run's two snapshots, of steps 4 and 2; it was trained two steps further."""
    work = start_worker()
    for first in (0, 2):
        train("m", 2, first=first)
        work()
        work.loop.give_back()
    train("m", 2, first=4)
    work()
    rows = Snapshot.objects.order_by("-seq_id")
    assert [row.step for row in rows] == [4, 2]
    return [Path(settings.DATA_DIR) / row.directory for row in rows]


@pytest.fixture
def unbroken(start_worker: Start, train: Train) -> dict[str, object]:
    """The state of a run that was trained the same and lost nothing."""
    work = start_worker()
    train("unbroken", 6)
    work()
    return state_of(work, "unbroken")


def steps_replayed(start_worker: Start, expected: dict[str, object]) -> int:
    """Optimizer steps that a new worker repeats until its run is the same as the unbroken one."""
    verbs: list[str] = []
    engine = fake_engine(before_verb=lambda verb, names: verbs.append(verb))
    assert_same(state_of(start_worker(engine), "m"), expected)
    return verbs.count("optim_step")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_snapshot_costs_a_longer_replay_and_no_bit(
    unbroken: dict[str, object],
    snapshots: list[Path],
    start_worker: Start,
    damage: Callable[[Path], None],
) -> None:
    assert steps_replayed(start_worker, unbroken) == 2
    damage(snapshots[0])
    assert steps_replayed(start_worker, unbroken) == 4


def test_without_any_readable_snapshot_the_whole_log_is_replayed(
    unbroken: dict[str, object], snapshots: list[Path], start_worker: Start
) -> None:
    for folder in snapshots:
        flip_a_bit(folder)
    assert steps_replayed(start_worker, unbroken) == 6


def test_without_snapshot_and_log_a_run_fails_by_name_and_the_others_go_on(
    snapshots: list[Path], start_worker: Start, train: Train
) -> None:
    for folder in snapshots:
        flip_a_bit(folder)
    Future.objects.filter(seq_id=3).update(payload=None)
    lost, other = train("m"), train("other")
    start_worker()()
    assert_all_ready(other)
    for future in lost:
        future.refresh_from_db()
        assert (future.state, future.error_code) == ("failed", "RunLost")
        assert "'m' cannot be rebuilt" in future.error


def test_a_damaged_snapshot_is_replaced_by_one_of_the_same_point(
    unbroken: dict[str, object], snapshots: list[Path], start_worker: Start
) -> None:
    work = start_worker()
    state_of(work, "m")
    work.loop.give_back()
    newest = Snapshot.objects.order_by("-seq_id")[0]
    assert newest.seq_id == Run.objects.get(name="m").applied_seq_id
    flip_a_bit(snapshots[0].parent / Path(newest.directory).name)

    work = start_worker()
    state_of(work, "m")
    work.loop.give_back()
    assert steps_replayed(start_worker, unbroken) == 0


def test_what_is_unreadable_is_not_kept_in_the_place_of_what_can_be_read(
    snapshots: list[Path], start_worker: Start, train: Train
) -> None:
    flip_a_bit(snapshots[0])
    work = start_worker()
    train("m", 1, first=6)
    work()
    work.loop.give_back()
    kept = Snapshot.objects.filter(run__name="m").order_by("-seq_id")
    assert [row.step for row in kept] == [7, 2]
    assert not snapshots[0].exists()
    assert snapshots[1].exists()
