"""A run is replayed beside itself, and forked at a step: the same bits, once, within limits."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from django.contrib.auth.models import User
from django.db import connection
from pytest_django import Settings

from futures.models import Future, Lane
from tests.conftest import InProcessWorker
from tests.waiting import LONG_SECONDS
from training.errors import (
    InvalidRequest,
    LimitExceeded,
    RunLost,
    StorageQuotaExceeded,
    TokenQuotaExceeded,
)
from training.models import AuditEvent, Checkpoint, Run
from training.replays import replay_of, replay_sentence
from training.services import (
    checkpoint_delete,
    load_weights_submit,
    run_fork,
    run_remove_submit,
    run_replay,
    save_weights_submit,
)
from training.storage_quota import forget_counts

Submit = Callable[..., Future]
KEYS = ("weights", "exp_avg", "exp_avg_sq", "grad")


def state_of(work: InProcessWorker, run: Run) -> dict[str, np.ndarray]:
    return work.engine.trainer.adapter_state(run.pk)  # type: ignore[return-value]


def said(run: Run) -> str:
    run.refresh_from_db()
    return replay_sentence(replay_of(run))


def test_a_replay_is_equal_to_the_last_bit_and_says_so(trained: Run, work: InProcessWorker) -> None:
    copy = run_replay(run=trained, actor_id=None, key="k")
    log = Future.objects.filter(lane_id=trained.pk).count()
    assert said(copy) == f"0 of {log} requests are repeated."
    work()

    assert said(copy) == (
        f"Equal to the last bit: {log} of {log} requests are repeated, with the same losses and "
        "gradient norms, and all weights, gradients and optimizer moments are the same."
    )
    ours, theirs = state_of(work, copy), state_of(work, trained)
    assert all(np.array_equal(ours[key], theirs[key]) for key in KEYS)
    assert (copy.step, copy.owner_id, copy.replay_of) == (3, trained.owner_id, trained)
    assert AuditEvent.objects.filter(event="run_replay").count() == 1


def test_a_replays_requests_have_the_facts_of_the_first_ones(
    trained: Run, work: InProcessWorker
) -> None:
    copy = run_replay(run=trained, actor_id=None, key="k")
    work()

    log = Future.objects.filter(lane_id=copy.pk, replay_of__isnull=False).order_by("seq_id")
    facts = [(again.summary, again.replay_of.summary) for again in log if again.replay_of]
    assert {"learning_rate", "datums"} <= {name for facts_of, _ in facts for name in facts_of}
    assert all(again.keys() == first.keys() for again, first in facts)


def test_a_replay_says_where_it_differs(trained: Run, work: InProcessWorker) -> None:
    other = Future.objects.filter(lane_id=trained.pk, kind="forward_backward").order_by("seq_id")[1]
    other.summary["loss"] += 0.5
    other.save(update_fields=["summary"])
    copy = run_replay(run=trained, actor_id=None, key="k")
    work()

    assert f"request {other.seq_id} (forward_backward) differs: loss " in said(copy)
    assert f"and was {other.summary['loss']!r}" in said(copy)


def test_a_replay_says_that_weights_differ(trained: Run, work: InProcessWorker) -> None:
    work.engine.trainer.find(trained.pk).weights[0, 0] += 1.0  # type: ignore[attr-defined]
    copy = run_replay(run=trained, actor_id=None, key="k")
    work()

    assert "all equal, but the weights differ: weights by up to 1" in said(copy)


def test_a_replay_beside_a_run_that_goes_on_says_so(
    trained: Run, work: InProcessWorker, optim_step: Submit
) -> None:
    optim_step("m", learning_rate=0.1)  # before the replay in the queue, after its log
    copy = run_replay(run=trained, actor_id=None, key="k")
    work()

    assert "all equal; the original was trained further, so its weights differ" in said(copy)


def test_a_request_that_fails_only_in_the_replay_is_named(
    trained: Run, work: InProcessWorker, owner: User
) -> None:
    save_weights_submit(owner_id=owner.pk, model_id="m", name="s", kind="training")
    work()
    loaded = load_weights_submit(owner_id=owner.pk, model_id="m", path="tinker://m/weights/s")
    work()
    trained.refresh_from_db()
    checkpoint_delete(checkpoint_id=Checkpoint.objects.get().pk, actor_id=None)
    copy = run_replay(run=trained, actor_id=None, key="k")
    work()

    name = f"request {loaded.future.seq_id} (load_weights) differs: it is failed, and was ready"
    assert name in said(copy)


def test_asking_twice_makes_one_replay(trained: Run, work: InProcessWorker) -> None:
    first = run_replay(run=trained, actor_id=None, key="k")
    assert run_replay(run=trained, actor_id=None, key="k") == first
    work()
    assert run_replay(run=trained, actor_id=None, key="k") == first
    assert run_replay(run=trained, actor_id=None, key="another") != first
    assert Run.objects.filter(replay_of=trained).count() == 2


@pytest.mark.django_db(transaction=True)
def test_asking_twice_at_once_makes_one_replay(trained: Run) -> None:
    together = threading.Barrier(2, timeout=LONG_SECONDS)
    made: list[str] = []

    def ask() -> None:
        run = Run.objects.get(pk=trained.pk)
        together.wait()
        made.append(run_replay(run=run, actor_id=None, key="k").pk)
        connection.close()

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert made[0] == made[1]
    copy = Run.objects.get(replay_of=trained)
    log = Future.objects.filter(lane_id=trained.pk).count()
    assert Future.objects.filter(lane_id=copy.pk).count() == log + 1
    assert Lane.objects.get(pk=copy.pk).last_seq_id == log + 1


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_a_fork_has_the_state_after_its_step(
    work: InProcessWorker,
    forward_backward: Submit,
    optim_step: Submit,
    owner: User,
    step: int,
    from_checkpoint: bool,
) -> None:
    for number in range(1, 4):
        forward_backward("m", f"question {number}", "answer")
        optim_step("m", learning_rate=0.1)
        work()
        if number == step:
            expected = {
                key: value.copy()
                for key, value in state_of(work, Run.objects.get(name="m")).items()
                if key in KEYS
            }
            if from_checkpoint:
                save_weights_submit(owner_id=owner.pk, model_id="m", name="s", kind="training")
                work()
    run = Run.objects.get(name="m")
    fork = run_fork(run=run, step=step, actor_id=None, key="k")
    assert Future.objects.filter(lane_id=fork.pk, kind="optim_step").exists() != from_checkpoint
    work()

    fork.refresh_from_db()
    assert fork.step == step
    forked = state_of(work, fork)
    assert all(np.array_equal(forked[key], expected[key]) for key in KEYS)
    assert str(Checkpoint.objects.get(run=fork).path) == f"tinker://m-fork-1/weights/step-{step}"
    forward_backward("m-fork-1", "more", "training")
    optim_step("m-fork-1", learning_rate=0.1)
    work()
    fork.refresh_from_db()
    assert fork.step == step + 1
    assert run_fork(run=run, step=step, actor_id=None, key="k") == fork


def test_a_fork_is_of_the_steps_that_the_run_has_not_taken_back(
    work: InProcessWorker, forward_backward: Submit, optim_step: Submit, owner: User
) -> None:
    def step(text: str, *, saved_as: str) -> None:
        forward_backward("m", text, "answer")
        optim_step("m", learning_rate=0.1)
        save_weights_submit(owner_id=owner.pk, model_id="m", name=saved_as, kind="training")
        work()

    step("one", saved_as="s1")
    step("two", saved_as="s2")
    load_weights_submit(owner_id=owner.pk, model_id="m", path="tinker://m/weights/s1")
    forward_backward("m", "another", "answer")
    optim_step("m", learning_rate=0.1)
    work()
    run = Run.objects.get(name="m")
    expected = {key: value.copy() for key, value in state_of(work, run).items() if key in KEYS}
    fork = run_fork(run=run, step=2, actor_id=None, key="k")
    work()

    forked = state_of(work, fork)
    assert all(np.array_equal(forked[key], expected[key]) for key in KEYS)
    with pytest.raises(InvalidRequest, match=r"step: after step 1 'm' has loaded tinker://m/"):
        run_fork(run=run, step=1, actor_id=None, key="another")
    assert Run.objects.count() == 2


def test_a_fork_at_a_step_that_is_not_there_is_refused(trained: Run) -> None:
    for step in (-1, 0, 4):
        with pytest.raises(InvalidRequest, match=f"step: expected 1 to 3, got {step}"):
            run_fork(run=trained, step=step, actor_id=None, key="k")


def test_a_pruned_log_is_refused_unless_a_checkpoint_has_the_step(
    trained: Run, work: InProcessWorker, owner: User
) -> None:
    save_weights_submit(owner_id=owner.pk, model_id="m", name="s", kind="training")
    work()
    Future.objects.filter(lane_id=trained.pk, kind="optim_step").update(payload=None)
    for ask in (
        lambda: run_replay(run=trained, actor_id=None, key="a"),
        lambda: run_fork(run=trained, step=2, actor_id=None, key="b"),
    ):
        with pytest.raises(RunLost, match="pruned"):
            ask()
    assert Run.objects.count() == 1
    assert run_fork(run=trained, step=3, actor_id=None, key="c").replay_of == trained
    checkpoint_delete(checkpoint_id=Checkpoint.objects.get(name="s").pk, actor_id=None)
    with pytest.raises(RunLost, match="pruned"):
        run_fork(run=trained, step=3, actor_id=None, key="d")


def test_limits_of_a_user_hold_for_replays(trained: Run, settings: Settings) -> None:
    log = Future.objects.filter(lane_id=trained.pk).count()

    def refused(error: type[Exception]) -> None:
        with pytest.raises(error):
            run_replay(run=trained, actor_id=None, key="k")
        assert Run.objects.count() == 1
        assert Future.objects.count() == log

    settings.MAX_PENDING = log
    refused(LimitExceeded)
    settings.MAX_PENDING = log + 1
    settings.USER_STORAGE_BYTES = 1
    forget_counts()
    refused(StorageQuotaExceeded)
    settings.USER_STORAGE_BYTES = 0
    settings.USER_TOKENS_PER_DAY = 1
    refused(TokenQuotaExceeded)
    settings.USER_TOKENS_PER_DAY = 0
    settings.MAX_ADAPTERS = 1
    refused(LimitExceeded)
    settings.MAX_ADAPTERS = 2
    run_replay(run=trained, actor_id=None, key="k")


def test_a_removed_run_is_not_repeated(trained: Run, work: InProcessWorker, owner: User) -> None:
    run_remove_submit(owner_id=owner.pk, model_id="m")
    work()
    trained.refresh_from_db()
    with pytest.raises(InvalidRequest, match="is deleted"):
        run_replay(run=trained, actor_id=None, key="k")
