"""Cancelling a running sample: the worker drops it, and everything else continues."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest
from django.contrib.auth.models import User
from django.utils import timezone

from futures.broker import bell_rang
from futures.cancelling import future_cancel
from futures.errors import FutureNotCancellable
from futures.models import Future
from futures.notify import Bell
from tests.conftest import InProcessWorker
from tests.futures.conftest import race
from tests.training import test_worker
from training.base_models import base_model_get
from training.billing import Work, usage_by_hour
from training.engine.fake.engine import fake_engine
from training.models import Run
from training.types import SamplingParams
from training.worker import loop

Submit = Callable[..., Future]

LONG = SamplingParams(max_tokens=50, seed=1, stop=())
CANCELLED_AFTER = 3  # steps of the sampler
ENDLESS = 1_000_000  # tokens


class Steps:
    """Counts the sampler's steps, of one token each, and cancels after the third."""

    def __init__(self, work: InProcessWorker, *, told: bool = True) -> None:
        self.taken, self.cancelled_after = 0, CANCELLED_AFTER
        self.begun: list[str] = []
        self.cancelled: list[Future] = []
        self._told = told
        self._heard = Bell.SILENT
        sampler = work.engine.sampler
        poll, submit = sampler.poll, sampler.submit

        def counted_poll(wait_seconds):
            self.taken += 1
            finished = poll(wait_seconds)
            if self.taken == self.cancelled_after:
                for future in self.cancelled:
                    future_cancel(request_id=future.pk, owner_id=future.owner_id)
                self._heard = Bell.CANCELLED if self._told and self.cancelled else Bell.SILENT
            return finished

        def noted_submit(key, job):
            self.begun.append(key.rpartition(":")[0])
            submit(key, job)

        sampler.poll, sampler.submit = counted_poll, noted_submit
        work.loop._bell_rang = self.bell_rang

    def bell_rang(self, timeout_seconds: float) -> Bell:
        heard, self._heard = self._heard, Bell.SILENT
        return heard


@pytest.fixture(autouse=True)
def _a_slice_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAMPLING_SLICE_SECONDS", 0.0)


@pytest.fixture
def steps(work: InProcessWorker) -> Steps:
    return Steps(work)


def sample(owner: User, **fields: object) -> Future:
    """Submit a long sample of the model named, or of the base model."""
    base_model = None if "model_id" in fields else base_model_get(None).name
    fields = {"base_model": base_model, "sampling_params": LONG, **fields}
    return test_worker.sample(owner, **fields).future


def states(*futures: Future) -> list[str]:
    return [Future.objects.get(pk=future.pk).state for future in futures]


def test_a_cancelled_sample_is_sampled_no_further(
    work: InProcessWorker, steps: Steps, owner: User
) -> None:
    future = sample(owner, prompts=["one", "two"], num_samples=2)
    steps.cancelled = [future]
    work()

    assert states(future) == ["cancelled"]
    assert steps.taken == CANCELLED_AFTER
    assert work.engine.sampler.active == 0


def test_what_is_sampled_beside_a_cancelled_one_is_what_it_would_have_been(
    work: InProcessWorker, steps: Steps, owner: User, result: Callable[..., dict[str, object]]
) -> None:
    alone = sample(owner, prompts=["kept"])
    work()
    steps.taken = 0
    kept = sample(owner, prompts=["kept"])
    steps.cancelled = [sample(owner, prompts=["dropped"])]
    work()

    assert states(kept, *steps.cancelled) == ["ready", "cancelled"]
    assert result(kept)["completions"] == result(alone)["completions"]


def test_the_step_behind_a_cancelled_sample_need_not_wait_for_it(
    work: InProcessWorker, steps: Steps, owner: User, forward_backward: Submit, optim_step: Submit
) -> None:
    forward_backward("m", "hi", "hello")
    steps.cancelled = [sample(owner, model_id="m")]
    step = optim_step("m")
    work()

    assert states(*steps.cancelled, step) == ["cancelled", "ready"]
    assert steps.taken == CANCELLED_AFTER
    assert Run.objects.get().step == 1


def test_a_sample_that_was_claimed_and_not_begun_never_begins(
    work: InProcessWorker, steps: Steps, owner: User, forward_backward: Submit, optim_step: Submit
) -> None:
    forward_backward("m", "hi", "hello")
    first = sample(owner, model_id="m")
    step = optim_step("m")
    steps.cancelled = [sample(owner, model_id="m")]
    last = optim_step("m")
    work()

    assert states(first, step, *steps.cancelled, last) == ["ready", "ready", "cancelled", "ready"]
    assert steps.begun == [first.pk]


def test_a_cancellation_of_which_no_worker_hears_stands(
    work: InProcessWorker, owner: User, forward_backward: Submit, optim_step: Submit
) -> None:
    steps = Steps(work, told=False)
    forward_backward("m", "hi", "hello")
    steps.cancelled = [sample(owner, model_id="m")]
    step = optim_step("m")
    work()

    assert steps.taken == LONG.max_tokens
    assert states(*steps.cancelled, step) == ["cancelled", "ready"]
    assert Future.objects.get(pk=steps.cancelled[0].pk).result is None


def test_a_worker_that_stops_gives_back_all_but_what_was_cancelled(
    work: InProcessWorker, owner: User
) -> None:
    steps = Steps(work, told=False)
    kept = sample(owner)
    steps.cancelled = [sample(owner)]
    work.loop._stopping = lambda: steps.taken >= CANCELLED_AFTER
    work()
    assert states(kept, *steps.cancelled) == ["running", "cancelled"]
    work.loop.give_back()

    assert states(kept, *steps.cancelled) == ["pending", "cancelled"]


def test_what_had_been_sampled_is_counted_as_used(
    work: InProcessWorker, steps: Steps, owner: User
) -> None:
    future = sample(owner, prompts=["abcd"], num_samples=2)
    steps.cancelled = [future]
    work()

    now = timezone.now()
    used = usage_by_hour(
        owner_id=owner.pk, begin=now - timedelta(hours=2), end=now + timedelta(hours=1)
    )
    num_prompt_tokens = len(work.engine.renderer.encode("abcd"))
    assert {usage.work: usage.count for usage in used} == {
        Work.PREFILL: num_prompt_tokens,
        Work.SAMPLING: 2 * CANCELLED_AFTER,
    }


def test_prompts_that_were_finished_before_are_counted_too(
    work: InProcessWorker, steps: Steps, owner: User
) -> None:
    ends = {"sampling_params": SamplingParams(max_tokens=50, seed=1)}
    alone = [sample(owner, prompts=[prompt], **ends) for prompt in ("one", "two")]
    work()
    short, long = sorted(Future.objects.get(pk=one.pk).summary["tokens"] for one in alone)
    assert short < long - 1

    steps.taken, steps.cancelled_after = 0, long - 1
    steps.cancelled = [sample(owner, prompts=["one", "two"], **ends)]
    work()
    assert states(*steps.cancelled) == ["cancelled"]
    assert Future.objects.get(pk=steps.cancelled[0].pk).summary["tokens"] == short + long - 1


def test_a_training_operation_that_runs_is_not_torn_apart(
    start_worker: Callable[..., InProcessWorker], forward_backward: Submit
) -> None:
    submitted: list[Future] = []
    refused: list[str] = []

    def cancel(verb: str, adapter_names: tuple[str, ...]) -> None:
        if verb == "forward_backward":
            with pytest.raises(FutureNotCancellable) as error:
                future_cancel(request_id=submitted[0].pk, owner_id=submitted[0].owner_id)
            refused.append(str(error.value))

    work = start_worker(fake_engine(before_verb=cancel))
    submitted.append(forward_backward("m", "hi", "hello"))
    work()

    assert states(*submitted) == ["ready"]
    assert refused == ["It is already running and changes state, so it cannot be interrupted."]


def test_nothing_is_asked_of_the_database_while_nobody_cancels(
    work: InProcessWorker, steps: Steps, owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(loop, "futures_cancelled", lambda **fields: asked.append(fields) or set())
    future = sample(owner)
    work()
    assert states(future) == ["ready"]
    assert asked == []

    steps.taken, steps.cancelled = 0, [sample(owner)]
    work()
    assert len(asked) == 1


@pytest.mark.django_db(transaction=True)
def test_the_bell_brings_a_cancellation_from_another_process(
    start_worker: Callable[..., InProcessWorker], owner: User
) -> None:
    work = start_worker(fake_engine(max_context_tokens=ENDLESS))
    future = sample(owner, sampling_params=SamplingParams(max_tokens=ENDLESS, seed=1, stop=()))
    work.loop._bell_rang = partial(bell_rang, work.worker.queue)
    poll, taken = work.engine.sampler.poll, itertools.count(1)

    def cancelled_by_another_thread(wait_seconds):
        if next(taken) == CANCELLED_AFTER:
            [cancelled] = race(
                partial(future_cancel, request_id=future.pk, owner_id=future.owner_id)
            )
            assert cancelled.state == "cancelled"
        return poll(wait_seconds)

    work.engine.sampler.poll = cancelled_by_another_thread
    work()

    assert states(future) == ["cancelled"]
    assert CANCELLED_AFTER <= Future.objects.get(pk=future.pk).summary["tokens"] < ENDLESS
