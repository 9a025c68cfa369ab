"""Sampling over two ranks gives what one process gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.engine.group.conftest import NARROW_SETUPS, Pair, close, in_both_dtypes
from tests.engine.sampling_jobs import job
from training.engine.interface import Engine, SampleJob, SampleOutput
from training.engine.torch import lora_linear
from training.engine.torch.packing.stream import SMALL_PRODUCT
from training.errors import InvalidRequest, TrainingError
from training.types import AdamParams


def outputs(engine: Engine, jobs: Mapping[str, SampleJob]) -> dict[str, SampleOutput]:
    for key, each in jobs.items():
        engine.sampler.submit(key, each)
    results: dict[str, SampleOutput | TrainingError] = {}
    while engine.sampler.active:
        results |= engine.sampler.poll(0)
    done = {key: result for key, result in results.items() if isinstance(result, SampleOutput)}
    assert done.keys() == jobs.keys(), results
    return done


def same_samples(pair: Pair, jobs: Mapping[str, SampleJob]) -> None:
    alone, group = (outputs(engine, jobs) for engine in pair.both())
    for key, theirs in alone.items():
        ours = group[key]
        for own, expected in zip(ours.sequences, theirs.sequences, strict=True):
            assert list(own.tokens) == list(expected.tokens), key
            assert own.stop_reason == expected.stop_reason
            close(own.logprobs, expected.logprobs, key)
        if theirs.prompt_logprobs is not None:
            assert ours.prompt_logprobs is not None
            close(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], key)


@pytest.fixture
def published(adapters: Pair) -> Pair:
    for engine in adapters.both():
        for name in engine.trainer.adapter_names():
            captured = engine.trainer.capture_adapter(name, with_optimizer=False)
            engine.sampler.publish(f"{name}:1", captured)
    return adapters


@pytest.fixture(autouse=True)
def _retired(pair: Pair) -> None:
    """Versions of the test before are gone."""
    for engine in pair.both():
        for version in list(engine.sampler.versions):
            engine.sampler.retire(version)


def test_jobs_of_every_kind_beside_each_other(published: Pair) -> None:
    same_samples(
        published,
        {
            "base": job(seed=1, num_samples=2),
            "wide": job([1] * 30, version="wide:1", num_samples=3, top_k=9, max_tokens=5),
            "narrow": job([7, 8], version="narrow:1", temperature=0.7, prompt_logprobs=True),
            "headless": job([3, 2, 1], version="headless:1", top_p=0.8, seed=8),
            "greedy": job([250], version="narrow:1", temperature=0.0),
            "stopped": job([9, 9], version="wide:1", stop=(200, 7, 30), max_tokens=30),
            "scored": job([5, 6, 7, 8], version="wide:1", max_tokens=0, prompt_logprobs=True),
        },
    )


@in_both_dtypes
def test_batch_mates_do_not_change_the_bits(published: Pair) -> None:
    """What was sampled beside others is sampled again alone after a crash."""
    jobs = {
        f"{version} {number}": job([number, 7, 9] * (number + 1), version=version, seed=number)
        for version in (None, "wide:1", "narrow:1", "headless:1")
        for number in range(4)
    }
    together = outputs(published.group, jobs)
    for key, each in jobs.items():
        [own], [beside] = (
            outputs(published.group, {key: each})[key].sequences,
            together[key].sequences,
        )
        assert list(own.tokens) == list(beside.tokens), key
        assert list(own.logprobs) == list(beside.logprobs), key


@pytest.mark.parametrize("pair", NARROW_SETUPS, indirect=True)
def test_no_product_with_a_ranks_part_has_too_few_rows(
    published: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another kernel would compute it, whose last bits differ once in thousands of rows."""
    multiplications: list[int] = []
    product = lora_linear.times_transposed

    def noting(rows: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        multiplications.append(len(rows) * weight.numel())
        return product(rows, weight, *args, **kwargs)

    monkeypatch.setattr(lora_linear, "times_transposed", noting)
    outputs(published.group, {"one": job([7]), "adapted": job([7], version="narrow:1")})
    assert multiplications
    assert min(multiplications) > SMALL_PRODUCT


def test_a_cancelled_job_leaves_the_others(published: Pair) -> None:
    for engine in published.both():
        engine.sampler.submit("long", job(max_tokens=40))
        engine.sampler.submit("waits", job([4] * 20, max_tokens=40))
        engine.sampler.poll(0)
        engine.sampler.poll(0)
        assert engine.sampler.cancel("long") > 0
        assert engine.sampler.cancel("unknown") == 0
        engine.sampler.cancel("waits")
        assert engine.sampler.active == 0
    same_samples(published, {"next": job(version="wide:1")})


def test_a_version_keeps_its_weights_while_the_adapter_moves_on(published: Pair) -> None:
    for engine in published.both():
        old = engine.trainer.capture_adapter("wide", with_optimizer=False)
        engine.trainer.optim_step("wide", AdamParams(learning_rate=0.1, weight_decay=0.5))
        engine.sampler.publish("old", old)
        new = engine.trainer.capture_adapter("wide", with_optimizer=False)
        engine.sampler.publish("new", new)
    same_samples(published, {name: job(version=name, seed=4) for name in ("old", "new", "wide:1")})


def test_a_checkpoint_is_published_and_retired(published: Pair, tmp_path: Path) -> None:
    published.alone.trainer.save_adapter("narrow", tmp_path / "saved")
    for engine in published.both():
        engine.sampler.publish("checkpoint", tmp_path / "saved")
    same_samples(published, {"one": job(version="checkpoint")})
    for engine in published.both():
        engine.sampler.retire("checkpoint")
        with pytest.raises(InvalidRequest, match="No version"):
            engine.sampler.submit("two", job(version="checkpoint"))
        engine.sampler.release_memory()
        engine.trainer.release_memory()
    same_samples(published, {"again": job(version="narrow:1")})


def test_training_between_steps_of_sampling(published: Pair) -> None:
    for engine in published.both():
        engine.sampler.submit("during", job(version="headless:1", max_tokens=20))
        engine.sampler.poll(0)
        engine.trainer.optim_step("headless", AdamParams(learning_rate=0.1))
    results = []
    for engine in published.both():
        finished: dict[str, SampleOutput | TrainingError] = {}
        while engine.sampler.active:
            finished |= engine.sampler.poll(0)
        output = finished["during"]
        assert isinstance(output, SampleOutput)
        results.append(list(output.sequences[0].tokens))
    assert results[0] == results[1]
