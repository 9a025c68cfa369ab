"""A worker dies; the next one continues as if nothing had happened, or reports why not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from django.contrib.auth.models import User
from pytest_django import Settings

from futures.errors import Fenced
from futures.models import Future, Worker
from futures.payload import decode
from tests.conftest import InProcessWorker
from training.base_models import base_model_get
from training.engine.fake.engine import fake_engine
from training.engine.fake.renderer import FakeRenderer
from training.engine.fake.trainer import ADAPTER_BYTES
from training.engine.interface import ForwardBackwardJob, Trainer
from training.errors import InvalidRequest, TrainingError
from training.kinds import SampleResult, stored_result
from training.models import RecordedSample, Run, Session, Snapshot
from training.services.sampling_sessions import sampling_session_create, session_sample_submit
from training.types import Datum, ForwardBackwardOutput, SamplingParams, ScoringParams
from training.worker.effects import Effects

Submit = Callable[..., Future]
Start = Callable[..., InProcessWorker]


class Killed(BaseException):
    """The process has ended."""


def state_of(worker: InProcessWorker, name: str) -> dict[str, Any]:
    """The run's adapter, rebuilt if need be."""
    run = Run.objects.get(name=name)
    return worker.engine.trainer.adapter_state(worker.loop.adapter_cache.bring_run(run))


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)


@pytest.fixture
def train(forward_backward: Submit, optim_step: Submit) -> Callable[[str, int], None]:
    """``train("m", 3)``: three steps of two forward_backwards each."""

    def submit(name: str, steps: int) -> None:
        for step in range(steps):
            forward_backward(name, f"question {step}", "answer")
            forward_backward(name, "again", f"answer {step}")
            optim_step(name, learning_rate=0.1)

    return submit


def test_a_new_worker_rebuilds_a_run_from_its_log(
    start_worker: Start, train: Callable[[str, int], None], forward_backward: Submit
) -> None:
    work = start_worker()
    train("m", 3)
    forward_backward("m", "half", "a step")
    work()
    before = state_of(work, "m")
    work.die()
    assert_same(state_of(start_worker(), "m"), before)


def test_what_the_first_version_trained_is_rebuilt_by_its_rules(
    start_worker: Start, forward_backward: Submit, optim_step: Submit
) -> None:
    """Including requests that are refused now: special tokens written out in a content."""

    class Newer(FakeRenderer):
        def render_conversation(self, messages: Any, **more: Any) -> Datum:
            if any("<|im_end|>" in message["content"] for message in messages):
                raise InvalidRequest("it holds a special token")
            datum = super().render_conversation(messages, **more)
            return replace(datum, model_input=datum.model_input[::-1])  # other tokens than then

        def render_by_first_rules(self, messages: Any, **more: Any) -> Datum:
            return super().render_conversation(messages, **more)

    work = start_worker()
    forward_backward("m", "a question", "an answer<|im_end|>and more")
    optim_step("m", learning_rate=0.1)
    forward_backward("m", "a question", "an answer")
    work()
    then = state_of(work, "m")
    work.die()
    Worker.objects.update(figures={})  # as that version leaves its row

    work = start_worker(fake_engine(renderer=Newer()))
    assert_same(state_of(work, "m"), then)
    forward_backward("m", "a question", "an answer")
    work()
    now = state_of(work, "m")
    work.die()

    assert_same(state_of(start_worker(fake_engine(renderer=Newer())), "m"), now)


def test_a_replay_is_told_from_a_first_time(
    start_worker: Start, train: Callable[[str, int], None]
) -> None:
    """So that no limit on time, which depends on the machine, can fail what did not fail before."""
    work = start_worker()
    train("m", 2)
    with replays_noted(work.engine.trainer) as first:
        work()
    work.die()
    rebuilding = start_worker()
    with replays_noted(rebuilding.engine.trainer) as again:
        state_of(rebuilding, "m")
    assert first == [False] * 4
    assert again == [True] * 4


@contextmanager
def replays_noted(trainer: Trainer) -> Iterator[list[bool]]:
    """The jobs of passes."""
    noted: list[bool] = []
    run = trainer.forward_backward

    def note(jobs: Sequence[ForwardBackwardJob]) -> list[ForwardBackwardOutput | TrainingError]:
        noted.extend(job.is_replay for job in jobs)
        return run(jobs)

    trainer.forward_backward = note  # type: ignore[method-assign]  # for the length of the block
    yield noted
    trainer.forward_backward = run  # type: ignore[method-assign]


def test_a_new_worker_rebuilds_a_run_from_snapshot_and_log(
    start_worker: Start, train: Callable[[str, int], None], forward_backward: Submit
) -> None:
    work = start_worker()
    train("m", 2)
    forward_backward("m", "half", "a step")
    work()
    work.loop.give_back()
    train("m", 1)
    work()
    before = state_of(work, "m")
    work.die()
    replayed: list[str] = []
    engine = fake_engine(before_verb=lambda verb, names: replayed.append(verb))
    assert_same(state_of(start_worker(engine), "m"), before)
    assert replayed.count("optim_step") == 1


def test_an_unreadable_snapshot_is_passed_over_for_the_one_before(
    start_worker: Start,
    train: Callable[[str, int], None],
    settings: Settings,
) -> None:
    work = start_worker()
    for _ in range(2):
        train("m", 1)
        work()
        work.loop.give_back()
    before = state_of(work, "m")
    work.die()
    newest = Snapshot.objects.order_by("-seq_id")[0]
    weights = Path(settings.DATA_DIR) / newest.directory / "weights.npy"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert_same(state_of(start_worker(), "m"), before)


@pytest.mark.parametrize("verb", ["forward_backward", "optim_step", "create_adapter"])
def test_a_worker_that_dies_in_an_operation_changes_nothing(
    start_worker: Start, train: Callable[[str, int], None], verb: str
) -> None:
    unbroken = start_worker()
    train("unbroken", 3)
    unbroken()
    expected = state_of(unbroken, "unbroken")

    countdown = {"left": 2 if verb != "create_adapter" else 1}

    def kill(name: str, _: tuple[str, ...]) -> None:
        countdown["left"] -= name == verb
        if name == verb and countdown["left"] == 0:
            raise Killed

    train("m", 3)
    with pytest.raises(Killed):
        start_worker(fake_engine(before_verb=kill))()
    work = start_worker()
    work()
    assert not Future.objects.exclude(state="ready").exists()
    assert_same(state_of(work, "m"), expected)


def test_a_request_that_kills_three_workers_fails_by_name_and_the_rest_go_on(
    start_worker: Start, forward_backward: Submit
) -> None:
    forward_backward("m", "hi")
    start_worker()()
    before = forward_backward("m", "good")
    poison = forward_backward("m", "poison")
    after = forward_backward("m", "good")

    class Poisoned(FakeRenderer):
        def render_conversation(self, messages: Any, **how: Any) -> Any:
            if messages[0]["content"] == "poison":
                raise Killed
            return super().render_conversation(messages, **how)

    for _ in range(3):
        with pytest.raises(Killed):
            start_worker(fake_engine(renderer=Poisoned()))()
    start_worker(fake_engine(renderer=Poisoned()))()
    for future in (before, poison, after):
        future.refresh_from_db()
    assert [before.state, poison.state, after.state] == ["ready", "failed", "ready"]
    assert "3 times" in poison.error


def test_what_was_claimed_and_not_begun_is_given_back_when_a_worker_stops(
    start_worker: Start, forward_backward: Submit
) -> None:
    work = start_worker()
    future = forward_backward("m", "hi")
    work.loop._stopping = iter([False, True]).__next__
    work()
    work.loop.give_back()
    future.refresh_from_db()
    assert (future.state, future.attempts) == ("pending", 0)
    start_worker()()
    future.refresh_from_db()
    assert future.state == "ready"


def test_idle_adapters_leave_for_their_snapshot_and_come_back(
    start_worker: Start, train: Callable[[str, int], None]
) -> None:
    work = start_worker(fake_engine(adapter_bytes=2 * ADAPTER_BYTES))
    for name in ("a", "b", "c"):
        train(name, 1)
    work()
    assert len(work.engine.trainer.adapter_names()) == 2
    first = state_of(work, "a")
    assert len(work.engine.trainer.adapter_names()) == 2
    assert_same(first, state_of(work, "c") | {})
    assert first["step"] == 1


def test_a_run_whose_log_was_pruned_fails_by_name(
    start_worker: Start, train: Callable[[str, int], None], forward_backward: Submit
) -> None:
    start_worker()
    train("m", 1)
    start_worker()()
    Future.objects.filter(kind="optim_step").update(payload=None)
    future = forward_backward("m", "more")
    start_worker()()
    future.refresh_from_db()
    assert (future.state, future.category, future.error_code) == ("failed", "server", "RunLost")
    assert "pruned" in future.error


def test_only_two_snapshots_are_kept_and_none_of_a_removed_run(
    start_worker: Start, train: Callable[[str, int], None], settings: Settings
) -> None:
    from training.services import run_remove_submit

    work = start_worker()
    for _ in range(4):
        train("m", 1)
        work()
        work.loop.give_back()
    run = Run.objects.get()
    directories = [Path(settings.DATA_DIR) / s.directory for s in run.snapshots.all()]
    assert len(directories) == 2
    assert all(directory.is_dir() for directory in directories)
    run_remove_submit(owner_id=run.owner_id, model_id="m")
    work()
    assert not run.snapshots.exists()
    assert not any(directory.exists() for directory in directories)


@pytest.fixture(autouse=True)
def _clean_snapshots(settings: Settings) -> Any:
    yield
    shutil.rmtree(Path(settings.DATA_DIR) / "snapshots", ignore_errors=True)


def test_a_replaced_worker_moves_no_run_back_even_where_it_finishes_nothing(
    start_worker: Start, train: Callable[[str, int], None]
) -> None:
    replaced = start_worker()
    train("m", 1)
    replaced()
    stale = Run.objects.get(name="m")
    start_worker()
    Run.objects.filter(id=stale.id).update(step=2, applied_seq_id=7)

    with pytest.raises(Fenced):
        replaced.loop._commit(Effects(runs=[stale]))

    run = Run.objects.get(id=stale.id)
    assert (run.step, run.applied_seq_id) == (2, 7)


def test_a_step_that_dropped_its_gradient_is_part_of_the_log(
    start_worker: Start,
    train: Callable[[str, int], None],
    train_datum: Submit,
    optim_step: Submit,
) -> None:
    """Rebuilt from the log, or from a snapshot and the log, the run has no such gradient either."""
    work = start_worker()
    train("m", 1)
    work()
    work.loop.give_back()
    train_datum("m", 1e30)
    spoilt = optim_step("m")
    train_datum("m", 1.0)
    optim_step("m")
    train_datum("m", 2.0)
    work()
    spoilt.refresh_from_db()
    assert (spoilt.state, spoilt.error_code) == ("failed", "GradientDropped")
    assert Future.objects.filter(state="failed").count() == 1
    before = state_of(work, "m")
    assert np.isfinite(before["grad"]).all()
    work.die()
    work = start_worker()
    assert_same(state_of(work, "m"), before)
    work.die()
    Snapshot.objects.all().delete()
    assert_same(state_of(start_worker(), "m"), before)


def test_a_snapshot_after_a_dropped_gradient_holds_that_it_was_dropped(
    start_worker: Start, train_datum: Submit, optim_step: Submit
) -> None:
    work = start_worker()
    train_datum("m", 1e30)
    spoilt = optim_step("m")
    work()
    work.loop.give_back()
    assert Snapshot.objects.get().seq_id == Run.objects.get(name="m").applied_seq_id
    assert Snapshot.objects.get().seq_id == spoilt.seq_id
    train_datum("m", 1.0)
    work()
    before = state_of(work, "m")
    work.die()
    assert_same(state_of(start_worker(), "m"), before)


def test_a_recorded_sample_is_committed_with_its_result_or_not_at_all(
    start_worker: Start, owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies at the commit leaves neither; the next one leaves both, once."""
    session = Session.objects.create(owner=owner, sdk_version="0.38.0")
    work = start_worker()
    sampling_session = sampling_session_create(
        owner_id=owner.pk,
        session_id=session.pk,
        sampling_session_seq_id=0,
        base_model=base_model_get(None).name,
        model_path=None,
    )
    future = session_sample_submit(
        owner_id=owner.pk,
        sampling_session_id=sampling_session.pk,
        seq_id=0,
        prompt=[1, 2, 3],
        num_samples=2,
        sampling_params=SamplingParams(max_tokens=4),
        prompt_logprobs=False,
        scoring=ScoringParams(),
        record=True,
    )

    def die(**_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("training.worker.loop.futures_finish", die)
        with pytest.raises(Killed):
            work()
    assert not RecordedSample.objects.exists()
    work.die()
    start_worker()()
    future.refresh_from_db()
    result = stored_result(future.kind, bytes(future.result or b""))
    assert isinstance(result, SampleResult)
    record = decode(bytes(RecordedSample.objects.get(pk=future.id).data))
    assert record["prompt"].tolist() == [1, 2, 3]
    for ours, told in zip(record["sequences"], result.sequences, strict=True):
        np.testing.assert_array_equal(ours["tokens"], told.tokens)
        np.testing.assert_array_equal(ours["logprobs"], told.logprobs)
