"""A worker whose files are in a bucket: only who needs the bucket waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from django.contrib.auth.models import User
from django.utils import timezone
from pytest_django import Settings

from futures.models import Future
from tests.conftest import InProcessWorker
from tests.faults.conftest import assert_all_ready, assert_same, state_of
from tests.storage.faulty_proxy import FaultyProxy
from training import services
from training.engine.fake.engine import fake_engine
from training.models import Checkpoint, Snapshot
from training.storage.interface import CHECKPOINTS, SNAPSHOTS
from training.storage.remote import RemoteFolders
from training.types import SamplingParams
from training.worker import fetches, snapshot_schedule
from training.worker.uploads import WAITING_OF_OWNER, Later

Start = Callable[..., InProcessWorker]
Train = Callable[..., list[Future]]
Kind = Literal["training", "sampler", "external"]

pytestmark = pytest.mark.usefixtures("place")


def save(owner: User, name: str, kind: Kind = "training", *, overwrite: bool = False) -> Future:
    return services.save_weights_submit(
        owner_id=owner.pk, model_id="m", name=name, kind=kind, overwrite=overwrite
    ).future


def load(owner: User, path: str, model_id: str = "m") -> Future:
    return services.load_weights_submit(owner_id=owner.pk, model_id=model_id, path=path).future


def error_of(future: Future) -> tuple[str, str]:
    future.refresh_from_db()
    return future.state, future.error_code


def order_of(*futures: Future) -> list[Future]:
    for future in futures:
        future.refresh_from_db()
    return sorted(futures, key=lambda future: future.finished_at or timezone.now())


def test_a_run_goes_on_at_a_machine_that_shares_nothing_but_the_bucket(
    start_worker: Start, train: Train, another_machine: Callable[[], None], owner: User
) -> None:
    work = start_worker()
    futures = train("unbroken", 6) + train("m", 3)
    saved = [save(owner, kind, kind) for kind in ("training", "sampler", "external")]
    work()
    work.loop.give_back()

    another_machine()
    verbs: list[str] = []
    other = start_worker(fake_engine(before_verb=lambda verb, names: verbs.append(verb)))
    futures += train("m", 3, first=3)
    other()
    assert_all_ready([*futures, *saved])
    assert_same(state_of(other, "m"), state_of(other, "unbroken"))
    assert verbs.count("optim_step") == 3, "the snapshot was loaded, not the log repeated"
    assert Snapshot.objects.count() > 0

    futures = [load(owner, "tinker://m/weights/training"), *train("m", 3, first=3)]
    other()
    assert_all_ready(futures)
    assert_same(state_of(other, "m"), state_of(other, "unbroken"))


@pytest.mark.parametrize("fault", ["refuse", "stall"])
def test_a_save_that_cannot_be_stored_fails_and_only_its_run_waits_for_it(
    work: InProcessWorker,
    train: Train,
    line: FaultyProxy,
    hasty: None,
    owner: User,
    place: RemoteFolders,
    fault: str,
    django_capture_on_commit_callbacks: Any,
) -> None:
    before = train("unbroken", 3) + train("m", 2) + train("other", 1)
    work()
    first = save(owner, "kept")
    work()
    kept = Checkpoint.objects.get()

    line.refuse() if fault == "refuse" else line.stall()
    failed = save(owner, "kept", overwrite=True)
    behind, beside = train("m", 1, first=2), train("other", 3, first=1)
    work()
    assert error_of(failed) == ("failed", "StorageFailed")
    assert "send the request again" in failed.error
    assert_all_ready([*before, first, *behind, *beside])
    if fault == "stall":
        assert order_of(failed, *behind, *beside) == [*beside, failed, *behind]
    assert Checkpoint.objects.get() == kept
    assert_same(state_of(work, "m"), state_of(work, "unbroken"))

    line.recover()
    again = save(owner, "kept", overwrite=True)
    with django_capture_on_commit_callbacks(execute=True):
        work()
    assert_all_ready([again])
    place.close()
    [folder] = place.folders(CHECKPOINTS)
    assert folder.directory == Checkpoint.objects.get().directory


def test_a_worker_that_stops_leaves_an_unfinished_save_to_the_next(
    start_worker: Start,
    train: Train,
    line: FaultyProxy,
    owner: User,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.worker.loop.STOP_UPLOAD_SECONDS", 0.0)
    monkeypatch.setattr(snapshot_schedule, "REMOTE_STOP_SECONDS", 0.0)
    work = start_worker()
    train("m", 2)
    work()
    line.stall()
    saved, behind = save(owner, "kept"), train("m", 1, first=2)
    work.loop._stopping = lambda: len(work.loop._uploads) > 0
    work()
    work.loop.give_back()
    saved.refresh_from_db()
    assert saved.state == "pending"
    assert not Checkpoint.objects.exists()

    line.recover()
    start_worker()()
    assert_all_ready([saved, *behind])
    assert Checkpoint.objects.get().step == 2


def test_a_slow_snapshot_is_recorded_later_and_nobody_waits_for_it(
    work: InProcessWorker,
    train: Train,
    line: FaultyProxy,
    owner: User,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(snapshot_schedule, "REMOTE_SECONDS", 0.1)
    train("m", 2)
    work()
    saved = save(owner, "kept")
    work()
    line.stall()
    loaded = load(owner, "tinker://m/weights/kept")  # asks for a snapshot at once
    futures = train("m", 1, first=2) + train("other", 2)
    work()
    assert_all_ready([saved, loaded, *futures])
    assert not Snapshot.objects.filter(run__name="m").exists()

    line.recover()
    line.close_connections()
    work.loop.adapter_cache._snapshots.wait()
    work.loop.turn()
    assert Snapshot.objects.filter(run__name="m").exists()


def test_a_run_whose_snapshot_does_not_arrive_waits_and_others_do_not(
    start_worker: Start,
    train: Train,
    line: FaultyProxy,
    hasty: None,
    another_machine: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetches, "AGAIN_SECONDS", 0.01)
    work = start_worker()
    futures = train("unbroken", 4) + train("m", 2)
    work()
    work.loop.give_back()

    another_machine()
    line.refuse()
    done: list[str] = []

    def note(verb: str, names: tuple[str, ...]) -> None:
        done.append(verb)
        if verb == "optim_step":
            line.recover()

    other = start_worker(fake_engine(before_verb=note))
    futures += train("m", 2, first=2) + train("beside", 1)
    other()
    assert_all_ready(futures)
    assert done.index("create_adapter") < done.index("optim_step") < done.index("load_adapter")
    assert_same(state_of(other, "m"), state_of(other, "unbroken"))


def test_after_a_while_it_fails_and_the_next_request_finds_the_run_as_it_was(
    start_worker: Start,
    train: Train,
    line: FaultyProxy,
    hasty: None,
    another_machine: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    owner: User,
) -> None:
    monkeypatch.setattr(fetches, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(fetches, "FAILED_SECONDS", 0.0)
    work = start_worker()
    train("m", 2)
    save(owner, "kept", "sampler")
    train("unbroken", 3)
    work()
    work.loop.give_back()
    snapshots = set(Snapshot.objects.values_list("pk", flat=True))

    another_machine()
    line.refuse()
    other = start_worker()
    failed = train("m", 1, first=2)
    sample = services.sample_submit(
        owner_id=owner.pk,
        model_id=None,
        base_model=None,
        model_path="tinker://m/sampler_weights/kept",
        prompts=["test"],
        num_samples=1,
        sampling_params=SamplingParams(max_tokens=3, seed=1),
    ).future
    other()
    assert {error_of(future) for future in [*failed, sample]} == {("failed", "StorageFailed")}
    assert set(Snapshot.objects.values_list("pk", flat=True)) == snapshots

    line.recover()
    futures = train("m", 1, first=2)
    other()
    assert_all_ready(futures)
    assert_same(state_of(other, "m"), state_of(other, "unbroken"))


def test_a_missing_snapshot_is_replaced_by_the_one_before(
    start_worker: Start,
    train: Train,
    place: RemoteFolders,
    another_machine: Callable[[], None],
) -> None:
    futures = train("unbroken", 5)
    for first in (0, 2):
        work = start_worker()
        futures += train("m", 2, first=first)
        work()
        work.loop.give_back()
    newest, _ = Snapshot.objects.filter(run__name="m").order_by("-seq_id")
    place.purge(newest.directory)

    another_machine()
    verbs: list[str] = []
    other = start_worker(fake_engine(before_verb=lambda verb, names: verbs.append(verb)))
    futures += train("m", 1, first=4)
    other()
    assert_all_ready(futures)
    assert verbs.count("optim_step") == 3
    assert_same(state_of(other, "m"), state_of(other, "unbroken"))


def test_what_is_superseded_and_removed_leaves_the_bucket(
    work: InProcessWorker,
    train: Train,
    owner: User,
    place: RemoteFolders,
    django_capture_on_commit_callbacks: Any,
) -> None:
    for step in range(4):
        train("m", 1, first=step)
        save(owner, "kept", overwrite=True)
        with django_capture_on_commit_callbacks(execute=True):
            work()
        work.loop.adapter_cache.snapshot_all()
    services.run_remove_submit(owner_id=owner.pk, model_id="m")
    work()
    place.close()
    assert [folder.directory for folder in place.folders(CHECKPOINTS)] == [
        Checkpoint.objects.get().directory
    ]
    assert list(place.folders(SNAPSHOTS)) == []


def test_of_many_saves_of_one_owner_few_wait_on_the_disk(
    work: InProcessWorker,
    train: Train,
    line: FaultyProxy,
    hasty: None,
    owner: User,
    settings: Settings,
) -> None:
    names = [f"m{number}" for number in range(WAITING_OF_OWNER + 3)]
    for name in names:
        train(name, 1)
    train("m", 1)
    work()
    line.stall()
    saves = [
        services.save_weights_submit(
            owner_id=owner.pk, model_id=name, name="kept", kind="training"
        ).future
        for name in names
    ]
    most = 0
    begin = work.loop._uploads.begin

    def counted(future: Future, later: Later) -> None:
        nonlocal most
        begin(future, later)
        most = max(most, len(work.loop._uploads))
        if most == WAITING_OF_OWNER:
            line.recover()

    work.loop._uploads.begin = counted  # type: ignore[method-assign]
    work()
    assert_all_ready(saves)
    assert most == WAITING_OF_OWNER


def test_few_of_many_runs_are_fetched_at_once(
    start_worker: Start,
    train: Train,
    another_machine: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    place: RemoteFolders,
) -> None:
    monkeypatch.setattr(fetches, "MOST", 2)
    work = start_worker()
    names = [f"m{number}" for number in range(6)]
    futures = [future for name in ["unbroken", *names] for future in train(name, 2)]
    work()
    work.loop.give_back()

    another_machine()
    other = start_worker()
    most = 0
    begin = other.loop._fetches._begin

    def counted(directory: str, fetch: Any) -> None:
        nonlocal most
        most = max(most, len(other.loop._fetches._fetches))
        begin(directory, fetch)

    monkeypatch.setattr(other.loop._fetches, "_begin", counted)
    futures += [future for name in ["unbroken", *names] for future in train(name, 1, first=2)]
    other()
    assert_all_ready(futures)
    assert most == 2
    for name in names:
        assert_same(state_of(other, name), state_of(other, "unbroken"))


def test_an_encrypted_export_is_nowhere_in_plain(
    work: InProcessWorker, train: Train, owner: User, place: RemoteFolders, settings: Settings
) -> None:
    train("m", 1)
    saved = services.save_weights_submit(
        owner_id=owner.pk,
        model_id="m",
        name="kept",
        kind="external",
        recipients=["age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"],
    ).future
    work()
    assert_all_ready([saved])
    names = place.files(Checkpoint.objects.get().directory)
    assert names == ["adapter_config.json.age", "adapter_model.safetensors.age"]
    assert not list(Path(settings.DATA_DIR).rglob("*.safetensors"))


def test_nobody_is_charged_for_a_slow_bucket(
    work: InProcessWorker,
    train: Train,
    line: FaultyProxy,
    hasty: None,
    owner: User,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    charged: list[float] = []
    waited: list[float] = []
    wait = work.loop._wait_for_files

    def timed() -> None:
        begin = time.monotonic()
        wait()
        waited.append(time.monotonic() - begin)

    monkeypatch.setattr(work.loop, "_wait_for_files", timed)
    train("m", 1)
    work()
    line.stall()
    saved = save(owner, "kept")
    monkeypatch.setattr(
        "training.worker.loop.usage_record", lambda ids, *, seconds: charged.append(seconds)
    )
    begin = time.monotonic()
    work()
    elapsed = time.monotonic() - begin
    assert error_of(saved) == ("failed", "StorageFailed")
    assert charged
    assert waited
    assert sum(charged) + sum(waited) <= elapsed
