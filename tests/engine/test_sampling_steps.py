"""Which jobs run in a step: prompts in chunks, a full cache, refusals, failures, cancellation."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.reference import TinyTrainer
from tests.engine.sampling_jobs import MakeSampler, job, run, run_all, sample
from tests.tiny_model import VOCAB_SIZE
from training.engine.interface import SampleJob, SampleOutput
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.errors import InvalidRequest, LimitExceeded, NonFiniteResult, TrainingError
from training.types import LoraConfig

# -- room ------------------------------------------------------------------------------------------


def test_a_prompt_longer_than_a_chunk_is_read_in_several_steps(make_sampler: MakeSampler) -> None:
    prompt = np.random.default_rng(1).integers(0, VOCAB_SIZE, 40).tolist()
    whole = sample(make_sampler(), job(prompt, temperature=0.0))
    cut = make_sampler(prefill_chunk_tokens=16)
    cut.submit("one", job(prompt, temperature=0.0))
    num_steps, results = 0, {}
    while cut.active:
        results |= cut.poll(0)
        num_steps += 1
    assert num_steps == 3 + 11  # chunks of 16, 16 and 8, the last of which samples too
    assert results["one"].sequences[0].tokens == whole.tokens
    np.testing.assert_allclose(results["one"].sequences[0].logprobs, whole.logprobs, atol=2e-5)


def test_short_prompts_are_read_together(make_sampler: MakeSampler) -> None:
    jobs = {str(i): job([i + 3] * (i + 2), seed=i) for i in range(4)}  # 14 tokens in all
    sampler = make_sampler(prefill_chunk_tokens=32)
    for key, each in jobs.items():
        sampler.submit(key, each)
    num_steps, results = 0, {}
    while sampler.active:
        results |= sampler.poll(0)
        num_steps += 1
    assert num_steps == 1 + 11
    for key, each in jobs.items():
        alone = run(make_sampler(prefill_chunk_tokens=32), each)
        assert results[key].sequences == alone.sequences


def test_a_long_prompt_and_the_active_jobs_take_turns(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(prefill_chunk_tokens=8)
    sampler.submit("short", job(max_tokens=6))
    sampler.poll(0)  # reads the short prompt and samples its first token
    sampler.submit("long", job([9] * 200))
    results: dict[str, object] = {}
    for _ in range(10):  # five more tokens in turns with five chunks
        results |= sampler.poll(0)
    assert list(results) == ["short"]


def test_a_job_waits_while_the_cache_is_full_and_then_runs(
    make_sampler: MakeSampler, crowd: dict[str, SampleJob]
) -> None:
    sampler = make_sampler(cache_tokens=128)
    first = job([6] * 100, max_tokens=20)
    sampler.submit("first", first)
    sampler.submit("second", crowd["base"])
    results: dict[str, SampleOutput | TrainingError] = {}
    order: list[str] = []
    while sampler.active:
        step = sampler.poll(0)
        order += step
        results |= step
    assert order == ["first", "second"]
    second = results["second"]
    assert isinstance(second, SampleOutput)
    assert second.sequences == run(make_sampler(), crowd["base"]).sequences


def test_a_crowd_in_a_small_cache_is_what_each_job_is_alone(
    make_sampler: MakeSampler, crowd: dict[str, SampleJob]
) -> None:
    """Jobs come and go, so their places in the cache differ from those they have alone."""
    cramped = run_all(make_sampler(cache_tokens=192, max_sequences=4), crowd)
    for key, each in crowd.items():
        result = cramped[key]
        assert isinstance(result, SampleOutput)
        assert result.sequences == run(make_sampler(), each).sequences


def test_more_sequences_than_are_sampled_at_once_are_refused(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(max_sequences=4)
    with pytest.raises(LimitExceeded, match="num_samples: 5 is more than the 4"):
        sampler.submit("one", job(num_samples=5, max_tokens=1))
    assert sampler.active == 0


def test_without_max_tokens_a_job_takes_what_the_cache_has(make_sampler: MakeSampler) -> None:
    ours = run(make_sampler(cache_tokens=64), job(num_samples=2, max_tokens=None)).sequences
    assert [len(sequence.tokens) for sequence in ours] == [64 - 5 + 1] * 2


def test_an_idle_sampler_gives_its_cache_back_and_makes_it_again(
    make_sampler: MakeSampler, crowd: dict[str, SampleJob]
) -> None:
    sampler = make_sampler()
    expected = run(sampler, crowd["wide"]).sequences
    sampler.submit("active", crowd["base"])
    sampler.poll(0)
    sampler.release_memory()
    cache = sampler._runner._cache  # type: ignore[attr-defined]
    assert not cache.is_empty  # a job uses it
    run_all(sampler, {})
    sampler.release_memory()
    assert cache.is_empty
    assert run(sampler, crowd["wide"]).sequences == expected


# -- failures and cancellation ---------------------------------------------------------------------


def test_a_job_whose_logits_are_not_finite_fails_alone(
    trained: TinyTrainer, make_sampler: MakeSampler, crowd: dict[str, SampleJob]
) -> None:
    expected = run_all(make_sampler(), crowd)
    trained.create_adapter("broken", LoraConfig(rank=2))
    flat = trained.adapter_state("broken")["weights"]
    trained.set_weights("broken", np.full_like(flat, np.nan))
    results = run_all(make_sampler(), {**crowd, "bad": job(version="broken", num_samples=2)})
    assert isinstance(results.pop("bad"), NonFiniteResult)
    for key, result in results.items():
        assert isinstance(result, SampleOutput)
        assert result.sequences == expected[key].sequences


def test_cancelling_frees_the_cache_and_leaves_the_others_alone(
    make_sampler: MakeSampler, crowd: dict[str, SampleJob]
) -> None:
    sampler = make_sampler(cache_tokens=256, prefill_chunk_tokens=8)
    sampler.submit("decoding", job(num_samples=2, max_tokens=20))
    sampler.submit("stays", crowd["other"])
    for _ in range(6):
        sampler.poll(0)
    sampler.submit("prefilling", job([1] * 60))
    sampler.poll(0)
    sampler.poll(0)
    sampler.submit("waiting", job([2] * 200))
    for key in ("decoding", "prefilling", "waiting", "never heard of"):
        sampler.cancel(key)
    assert sampler.active == 1
    results = run_all(sampler, {})
    assert list(results) == ["stays"]
    assert results["stays"].sequences == run(make_sampler(), crowd["other"]).sequences
    whole_cache = job([2] * 200, max_tokens=57)
    assert len(sample(sampler, whole_cache).tokens) == 57


def test_cancelling_says_how_many_tokens_had_been_sampled(make_sampler: MakeSampler) -> None:
    asked = job(num_samples=2, max_tokens=9, stop=[])
    sampler = make_sampler()
    sampler.submit("whole", asked)
    steps = 0
    while sampler.active:
        finished = sampler.poll(0)
        steps += 1
    assert [len(s.tokens) for s in finished["whole"].sequences] == [9, 9]

    sampler.submit("cut", asked)
    for _ in range(steps - 1):
        sampler.poll(0)
    assert sampler.cancel("cut") == 2 * 8
    assert sampler.cancel("cut") == 0


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (job([]), "prompt: empty"),
        (job([1, VOCAB_SIZE]), rf"prompt\[1\]: token {VOCAB_SIZE} is not in the vocabulary"),
        (job([-1]), r"prompt\[0\]: token -1"),
        (job([1] * 512), "prompt: 512 tokens leave no room in the context: this model's maximum"),
        (job([1] * 513, max_tokens=0), "prompt: 513 tokens leave no room"),
        (job(num_samples=0), "num_samples: 0"),
        (job(max_tokens=-1), "max_tokens: -1"),
        (job(seed=None), "seed: none"),
        (job(temperature=-0.1), "temperature: -0.1"),
        (job(temperature=float("nan")), "temperature: nan"),
        (job(temperature=float("inf")), "temperature: inf"),
        (job(top_k=0), "top_k: 0"),
        (job(top_k=-2), "top_k: -2"),
        (job(top_p=0.0), "top_p: 0.0"),
        (job(top_p=1.01), "top_p: 1.01"),
        (job(top_p=float("nan")), "top_p: nan"),
        (job(stop=("a", "")), "stop: an empty string"),
        (job(stop=(VOCAB_SIZE,)), f"stop: token {VOCAB_SIZE}"),
        (job(stop=("a", 1)), "stop: either strings or token ids"),
        (job(version="unheard of"), "unheard of"),
    ],
)
def test_a_bad_job_is_refused_by_name(
    sampler: ContinuousSampler, bad: SampleJob, complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        sampler.submit("bad", bad)
    assert sampler.active == 0
