"""One user's long queue delays another's single step by no more than a few batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from django.contrib.auth.models import User
from pytest_django import Settings

from futures.models import Future, Lane
from tests.conftest import InProcessWorker
from training.models import Run

Submit = Callable[..., Future]

FEW_BATCHES = 6
"""A new user's step is three requests: the model's creation, a pass and an optimizer step. Each
may have one batch of the other user before it."""
BACKLOG = 1000
BATCH_TOKENS = 128


def backlog(of: Future, count: int, *, cost: int) -> None:
    """This many more equal requests after it, as if the client had sent them."""
    begin = of.seq_id or 0
    Future.objects.bulk_create(
        Future(
            owner_id=of.owner_id,
            queue=of.queue,
            lane_id=of.lane_id,
            seq_id=begin + number,
            kind=of.kind,
            payload=of.payload,
            payload_digest=of.payload_digest,
            cost=cost,
        )
        for number in range(1, count + 1)
    )
    Lane.objects.filter(pk=of.lane_id).update(last_seq_id=begin + count)


@pytest.mark.parametrize("arrives_at", [0, 5], ids=["behind it", "while it runs"])
@pytest.mark.parametrize(
    ("lanes", "cost"),
    [(1, 30), (20, 30), (1, 3 * BATCH_TOKENS)],
    ids=["one model", "twenty models", "requests larger than a batch"],
)
def test_a_single_step_passes_a_thousand_of_another_user(
    start_worker: Callable[..., InProcessWorker],
    forward_backward: Submit,
    optim_step: Submit,
    settings: Settings,
    arrives_at: int,
    lanes: int,
    cost: int,
) -> None:
    settings.BATCH_TOKENS = BATCH_TOKENS
    work = start_worker()
    for lane in range(lanes):
        first = forward_backward(f"greedy-{lane}", "a long question", "and an answer")
        backlog(first, BACKLOG // lanes, cost=cost)
    modest = User.objects.create_user("modest")
    step: list[Future] = []
    batches = 0

    def stopping() -> bool:
        """Asked before each batch; True once the step is done, or much too late."""
        nonlocal batches
        if batches == arrives_at:
            step.append(forward_backward("m", "hi", "hello", owner_id=modest.pk))
            step.append(optim_step("m", owner_id=modest.pk))
        batches += 1
        is_done = bool(step) and Future.objects.get(pk=step[-1].pk).is_final
        return is_done or batches > arrives_at + 50

    work.loop._stopping = stopping
    work.loop._bell_rang = lambda seconds: True
    work()

    assert Run.objects.get(owner=modest).step == 1
    assert batches - 1 - arrives_at <= FEW_BATCHES
    assert Future.objects.filter(owner=first.owner, state="pending").count() > BACKLOG / 2
