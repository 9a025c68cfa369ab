"""The work loop with a sampler that samples elsewhere, and so needs none of its time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from django.contrib.auth.models import User

from futures.models import Future
from tests.conftest import InProcessWorker
from training.engine.fake.engine import fake_engine
from training.engine.fake.sampler import FakeSampler
from training.engine.interface import SampleOutput
from training.errors import TrainingError
from training.services import sample_submit
from training.types import SamplingParams
from training.worker.loop import SAMPLING_SLICE_SECONDS

Submit = Callable[..., Future]


class NotedSampler(FakeSampler):
    """A fake sampler that notes how long each poll may take."""

    def __init__(self, *, needs_turns: bool) -> None:
        super().__init__(max_context_tokens=4096)
        self._needs_turns = needs_turns
        self.waits: list[float] = []

    @property
    def needs_turns(self) -> bool:
        return self._needs_turns

    def poll(self, wait_seconds: float) -> dict[str, SampleOutput | TrainingError]:
        self.waits.append(wait_seconds)
        return super().poll(0.0)


@pytest.fixture(params=[True, False], ids=["here", "elsewhere"])
def sampler(request: pytest.FixtureRequest) -> NotedSampler:
    return NotedSampler(needs_turns=request.param)


@pytest.fixture
def work(start_worker: Callable[..., InProcessWorker], sampler: NotedSampler) -> InProcessWorker:
    return start_worker(replace(fake_engine(), sampler=sampler))


def sample(owner: User) -> Future:
    return sample_submit(
        owner_id=owner.pk,
        model_id=None,
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        model_path=None,
        prompts=["hello"],
        num_samples=1,
        sampling_params=SamplingParams(max_tokens=8, seed=1),
    ).future


def test_only_a_sampler_that_needs_turns_gets_time_beside_a_pass(
    work: InProcessWorker, sampler: NotedSampler, owner: User, forward_backward: Submit
) -> None:
    futures = [sample(owner), forward_backward("m", "hi", "yes")]
    work()
    slices = [round(wait, 2) for wait in sampler.waits]
    assert slices[0] == (SAMPLING_SLICE_SECONDS if sampler.needs_turns else 0.0)
    assert slices[-1] > 0, "with nothing else to do it waits"
    for future in futures:
        future.refresh_from_db()
        assert future.state == "ready"


def test_samples_elsewhere_do_not_end_the_wait_for_batch_mates(
    work: InProcessWorker, sampler: NotedSampler, owner: User, forward_backward: Submit
) -> None:
    forward_backward("m", "hi", "yes")
    work()
    sample(owner)
    work.loop._claims.take()
    work.loop._run(work.loop._scheduler.next_batch())
    assert sampler.active
    forward_backward("m", "hi", "yes", delayable=True)
    work.loop._claims.take()
    assert work.loop._may_wait() is not sampler.needs_turns
