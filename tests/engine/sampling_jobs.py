"""Sampling jobs of the tests, and how they are run to their end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from training.engine.interface import SampleJob, SampleOutput
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.errors import TrainingError
from training.types import SampledSequence, SamplingParams

PROMPT = [5, 77, 130, 9, 200]

MakeSampler = Callable[..., ContinuousSampler]


def job(
    prompt: Sequence[int] = PROMPT,
    *,
    version: str | None = None,
    num_samples: int = 1,
    prompt_logprobs: bool = False,
    **params: object,
) -> SampleJob:
    """A job of 12 tokens per sequence that nothing stops, unless ``params`` say otherwise."""
    defaults: dict[str, object] = {"max_tokens": 12, "seed": 3, "stop": ()}
    return SampleJob(
        prompt=np.asarray(prompt, np.int32),
        sampling_params=SamplingParams(**{**defaults, **params}),
        num_samples=num_samples,
        version=version,
        prompt_logprobs=prompt_logprobs,
    )


def run_all(
    sampler: ContinuousSampler, jobs: Mapping[str, SampleJob]
) -> dict[str, SampleOutput | TrainingError]:
    for key, each in jobs.items():
        sampler.submit(key, each)
    results: dict[str, SampleOutput | TrainingError] = {}
    while sampler.active:
        results |= sampler.poll(0)
    return results


def run(sampler: ContinuousSampler, one: SampleJob) -> SampleOutput:
    result = run_all(sampler, {"one": one})["one"]
    if isinstance(result, TrainingError):
        raise result
    return result


def sample(sampler: ContinuousSampler, one: SampleJob) -> SampledSequence:
    (sequence,) = run(sampler, one).sequences
    return sequence
