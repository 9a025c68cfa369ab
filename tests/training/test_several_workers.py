"""Runs of one base model on two workers: each run is on one of them at a time, and its bits are the
same wherever it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import User

from futures import claiming
from futures.errors import Fenced
from futures.leases import lanes_release
from futures.lost_workers import crash_assumed, worker_reap
from futures.models import Future, Lane
from futures.workers import worker_live
from tests.conftest import InProcessWorker
from tests.faults.conftest import Disk, State, assert_same, disk, state_of
from tests.waiting import LONG_SECONDS
from training import services
from training.engine.fake.engine import fake_engine
from training.models import Run, Snapshot
from training.services.runs import run_compare_submit
from training.types import SamplingParams
from training.worker import claims, loop

__all__ = ["disk"]  # a fixture

Start = Callable[..., InProcessWorker]
Train = Callable[..., Future]
Result = Callable[[Future], dict[str, Any]]


@pytest.fixture
def pair(start_worker: Start, monkeypatch: pytest.MonkeyPatch) -> list[InProcessWorker]:
    """Two live workers that leave work to each other for as long as it takes."""
    monkeypatch.setattr(claiming, "PATIENCE_SECONDS", LONG_SECONDS)
    workers = [start_worker(), start_worker(beside=True)]
    for worker in workers:
        worker_live(worker.worker, {})
    return workers


@pytest.fixture
def train(forward_backward: Train, optim_step: Train) -> Callable[[str, int], list[Future]]:
    """``train("m", 2)``: submit the run's step number 2, the same for each run."""

    def submit(name: str, step: int) -> list[Future]:
        return [
            forward_backward(name, f"question {step}", "answer"),
            optim_step(name, learning_rate=0.1),
        ]

    return submit


def holder(name: str) -> int | None:
    return Lane.objects.get(pk=Run.objects.get(name=name).id).worker_id


def leave(worker: InProcessWorker, name: str) -> None:
    """Evict the run's adapter and release its lane, as when another one needs the room."""
    worker.loop.adapter_cache.pin(())
    assert worker.loop.adapter_cache._evict(Run.objects.get(name=name).id)
    worker.loop._release_lanes()


def unbroken(start_worker: Start, train: Callable[[str, int], list[Future]], steps: int) -> State:
    alone = start_worker()
    for step in range(steps):
        train("unbroken", step)
    alone()
    state = state_of(alone, "unbroken")
    alone.die()
    return state


def test_each_run_stays_with_its_worker_and_both_have_some(
    pair: list[InProcessWorker], train: Callable[[str, int], list[Future]], result: Result
) -> None:
    names = ["a", "b", "c", "d"]
    futures = [future for name in names for future in train(name, 0)]
    for worker in pair:
        worker()
    holders = {name: holder(name) for name in names}
    assert sorted(map(list(holders.values()).count, {w.worker.pk for w in pair})) == [2, 2]

    for step in range(1, 4):
        futures += [future for name in names for future in train(name, step)]
        for worker in pair[::-1]:
            worker()

    for future in futures:
        result(future)
        run = Run.objects.get(pk=future.lane_id)
        assert future.worker_id == holders[run.name]
    assert {name: holder(name) for name in names} == holders


def test_a_run_that_is_evicted_goes_on_elsewhere_with_the_same_bits(
    start_worker: Start,
    pair: list[InProcessWorker],
    train: Callable[[str, int], list[Future]],
) -> None:
    here, there = pair
    for step in range(6):
        train("m", step)
        here()
        assert holder("m") == here.worker.pk
        train("m", 100 + step)
        there()
        assert holder("m") == here.worker.pk
        here()
        leave(here, "m")
        assert holder("m") is None
        here, there = there, here

    moved = state_of(pair[0], "m")
    for worker in pair:
        worker.die()
    alone = start_worker()
    for step in range(6):
        train("unbroken", step)
        train("unbroken", 100 + step)
    alone()
    assert_same(moved, state_of(alone, "unbroken"))


def test_a_lost_workers_runs_go_on_elsewhere_with_the_same_bits(
    start_worker: Start,
    pair: list[InProcessWorker],
    train: Callable[[str, int], list[Future]],
    result: Result,
) -> None:
    """What it had computed and not committed is computed again, and what it commits is refused."""
    there = pair[1]
    stopped: list[InProcessWorker] = []
    futures: list[Future] = []

    def thought_dead(verb: str, names: tuple[str, ...]) -> None:
        if verb == "optim_step" and stopped and stopped[0].worker.pk == holder("m"):
            worker_reap(stopped.pop().worker, crashed=crash_assumed, must_be_unlocked=False)
            there()

    here = start_worker(fake_engine(before_verb=thought_dead), beside=True)
    pair[0].die()
    for step in range(4):
        futures += train("m", step)
    stopped.append(here)
    with pytest.raises(Fenced):
        here()

    for future in futures:
        result(future)
    assert holder("m") == there.worker.pk
    futures += train("m", 4)
    with pytest.raises(Fenced):
        here()
    there()
    moved = state_of(there, "m")
    for worker in [*pair, here]:
        worker.die()
    assert_same(moved, unbroken(start_worker, train, 5))


def test_a_worker_without_the_lease_names_no_snapshot(
    pair: list[InProcessWorker], train: Callable[[str, int], list[Future]]
) -> None:
    here, there = pair
    train("m", 0)
    here()
    run = Run.objects.get(name="m")
    assert here.loop.adapter_cache.snapshot(run)
    before = list(Snapshot.objects.values_list("directory", flat=True))
    worker_reap(here.worker, crashed=crash_assumed, must_be_unlocked=False)
    train("m", 1)
    there()

    assert not here.loop.adapter_cache.snapshot(Run.objects.get(name="m"))

    assert list(Snapshot.objects.values_list("directory", flat=True)) == before


def test_a_worker_that_stops_leaves_its_runs_to_the_other_from_their_snapshots(
    pair: list[InProcessWorker],
    train: Callable[[str, int], list[Future]],
    result: Result,
) -> None:
    here, there = pair
    train("m", 0)
    here()
    late = train("m", 1)

    here.loop.give_back()

    assert holder("m") is None
    there()
    for future in late:
        result(future)
    assert Snapshot.objects.filter(epoch=here.worker.pk).count() == 1


def test_a_run_that_is_only_read_is_not_kept(
    pair: list[InProcessWorker], train: Callable[[str, int], list[Future]], owner: User
) -> None:
    """The other worker changes it from now on, so a copy would grow old."""
    here, there = pair
    for name, worker in (("m", here), ("other", there)):
        train(name, 0)
        worker()
    assert (holder("m"), holder("other")) == (here.worker.pk, there.worker.pk)
    for _ in range(2):
        train("other", 1)
        there()
        compared = run_compare_submit(
            run=Run.objects.get(name="m"), other=Run.objects.get(name="other")
        )
        here()
        compared.refresh_from_db()
        assert compared.state == "ready", compared.error
    assert holder("other") == there.worker.pk
    assert here.loop.adapter_cache.lanes_without_adapter() == set()
    assert Run.objects.get(name="other").id not in here.engine.trainer.adapter_names()


def test_samples_of_a_checkpoint_run_on_any_worker_and_those_of_a_run_on_its_own(
    pair: list[InProcessWorker],
    train: Callable[[str, int], list[Future]],
    owner: User,
    result: Result,
) -> None:
    here, there = pair
    train("m", 0)
    here()
    saved = services.save_weights_submit(
        owner_id=owner.pk, model_id="m", name="kept", kind="sampler"
    )
    here()
    path = result(saved.future)["path"]
    params = SamplingParams(max_tokens=4, seed=1, temperature=1.0)

    def sample(**where: Any) -> Future:
        return services.sample_submit(
            owner_id=owner.pk,
            prompts=["hello"],
            num_samples=1,
            sampling_params=params,
            **{"model_id": None, "base_model": None, "model_path": None, **where},
        ).future

    def texts(future: Future) -> list[str]:
        return [sequence["text"] for sequence in result(future)["sequences"]]

    live, kept = sample(model_id="m"), sample(model_path=path)
    there()
    live.refresh_from_db()
    assert live.state == "pending"
    assert texts(kept)
    again = sample(model_path=path)
    here()
    assert texts(live) == texts(again) == texts(kept)
    assert again.worker_id == here.worker.pk
    assert kept.worker_id == there.worker.pk


def test_lanes_are_released_by_name(
    pair: list[InProcessWorker], train: Callable[[str, int], list[Future]]
) -> None:
    here, _ = pair
    train("m", 0)
    here()
    run = Run.objects.get(name="m")
    assert here.worker.leases == {run.id}

    lanes_release(worker=here.worker, lane_ids=[run.id])
    here.loop.turn()

    assert run.id not in here.engine.trainer.adapter_names(), "what is not leased is not kept"


def test_a_worker_with_more_runs_gives_some_to_one_that_starts_later(
    start_worker: Start,
    train: Callable[[str, int], list[Future]],
    result: Result,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the requests that it has claimed and not begun, and with the same bits."""
    monkeypatch.setattr(claiming, "PATIENCE_SECONDS", LONG_SECONDS)
    monkeypatch.setattr(loop, "EVEN_OUT_SECONDS", 0.0)
    first = start_worker()
    worker_live(first.worker, {})
    names = ["a", "b", "c", "d", "e"]
    for name in names:
        train(name, 0)
    first()
    assert len(first.worker.leases) == 5
    late = start_worker(beside=True)
    worker_live(late.worker, {})
    futures = [future for step in (1, 2) for name in names for future in train(name, step)]
    first.loop._claims.take()

    for _ in range(4):
        first.loop.idle_turn()
        late.loop.idle_turn()
        late()

    assert sorted([len(first.worker.leases), len(late.worker.leases)]) == [2, 3]
    assert {len(late.worker.leases)} == {
        len([name for name in names if holder(name) == late.worker.pk])
    }
    first()
    late()
    for future in futures:
        result(future)
    states = []
    for name in names:
        worker = first if holder(name) == first.worker.pk else late
        states.append(state_of(worker, name))
    for state in states[1:]:
        assert_same(states[0], state)


def test_a_run_whose_snapshot_cannot_be_written_stays(
    start_worker: Start,
    train: Callable[[str, int], list[Future]],
    monkeypatch: pytest.MonkeyPatch,
    disk: Disk,
) -> None:
    monkeypatch.setattr(loop, "EVEN_OUT_SECONDS", 0.0)
    first = start_worker()
    worker_live(first.worker, {})
    for name in ("a", "b", "c"):
        train(name, 0)
    first()
    worker_live(start_worker(beside=True).worker, {})
    disk.fail()

    first.loop.idle_turn()

    assert len(first.worker.leases) == 3
    disk.recover()
    first.loop.idle_turn()
    assert len(first.worker.leases) == 2


def test_an_idle_worker_takes_what_others_leave_for_too_long(
    pair: list[InProcessWorker],
    train: Callable[[str, int], list[Future]],
    result: Result,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(claims, "PATIENCE_SECONDS", LONG_SECONDS)
    first = pair[0]
    futures = [future for name in ("a", "b") for future in train(name, 0)]
    first()
    assert len(first.worker.leases) == 1, "the other one is the second worker's"
    assert not first.loop.idle_turn()
    assert first.loop._claims._look_at is not None
    first.loop._claims._look_at -= LONG_SECONDS  # which have passed
    assert first.loop.idle_turn(), "it is to look again"

    monkeypatch.setattr(claiming, "PATIENCE_SECONDS", 0.0)
    first()

    for future in futures:
        result(future)
    assert not first.loop.idle_turn()
