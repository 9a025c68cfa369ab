"""Users of long contexts and users of short ones share the time of the decode passes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.engine.sampling_jobs import MakeSampler, job, run, run_all
from tests.tiny_model import VOCAB_SIZE
from training.engine.sampler import turns
from training.engine.sampler.continuous_batching import ContinuousSampler


def prompt_of(length: int) -> list[int]:
    return np.random.default_rng(length).integers(3, VOCAB_SIZE, length).tolist()


def steps_until(sampler: ContinuousSampler, key: str) -> int:
    steps = 0
    while key not in sampler.poll(0):
        steps += 1
    return steps


@pytest.fixture
def small_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tiny contexts of these tests were long ones."""
    monkeypatch.setattr(turns, "SLACK_KEYS", 100)


def test_users_take_turns_in_having_their_prompts_read(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(prefill_chunk_tokens=8)
    for number in range(4):
        sampler.submit(f"long-{number}", replace(job(prompt_of(200)), group="long"))
    sampler.poll(0)
    sampler.submit("short", replace(job(max_tokens=4), group="short"))
    # Its prompt is read in the second pass from then on, and a token comes after each other one.
    assert steps_until(sampler, "short") <= 2 + 2 * 4


def num_sampled(sampler: ContinuousSampler, key: str) -> int:
    return sum(len(sequence.tokens) for sequence in sampler._active[key].sequences)


@pytest.mark.usefixtures("small_slack")
def test_long_contexts_wait_while_a_short_sample_of_another_user_is_cheaper(
    make_sampler: MakeSampler,
) -> None:
    sampler = make_sampler()
    long = replace(job(prompt_of(200), num_samples=16, max_tokens=200), group="long")
    short = replace(job(max_tokens=20), group="short")
    sampler.submit("long", long)
    for _ in range(10):
        sampler.poll(0)
    before = num_sampled(sampler, "long")
    sampler.submit("short", short)
    steps_until(sampler, "short")
    assert 16 <= num_sampled(sampler, "long") - before <= 10 * 16
    results = run_all(sampler, {})
    assert results["long"].sequences == run(make_sampler(), long).sequences  # type: ignore[union-attr]  # no error


@pytest.mark.usefixtures("small_slack")
def test_nobody_waits_for_ever(make_sampler: MakeSampler) -> None:
    """Short samples of one user come one after another; the other user's long ones end too."""
    sampler = make_sampler()
    long = replace(job(prompt_of(150), num_samples=2, max_tokens=5), group="long")
    sampler.submit("long", long)
    number = 0
    finished: set[str] = set()
    while "long" not in finished:
        if "short" not in sampler._active:
            sampler.submit("short", replace(job(seed=number), group="short"))
            number += 1
        finished |= set(sampler.poll(0))
    assert number < 60


@pytest.mark.usefixtures("small_slack")
def test_users_alike_share_every_pass(make_sampler: MakeSampler) -> None:
    sampler = make_sampler()
    for group in ("anna", "berta"):
        sampler.submit(group, replace(job(prompt_of(100), max_tokens=30), group=group))
    assert steps_until(sampler, "anna") <= 31


def test_one_user_alone_never_waits(make_sampler: MakeSampler) -> None:
    sampler = make_sampler()
    sampler.submit("long", job(prompt_of(200), num_samples=16, max_tokens=20))
    sampler.submit("short", job(max_tokens=20))
    assert steps_until(sampler, "short") <= 22
