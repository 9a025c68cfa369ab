"""What is sampled is what stock transformers and peft would compute, whatever shares the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.reference import PeftReference, TinyEngine
from tests.tiny_model import END_TOKEN, SPECIAL_TOKENS, VOCAB_SIZE, make_tokenizer
from training.engine.base_model import BaseModel
from training.engine.interface import SampleJob, SampleOutput
from training.engine.sampling import ContinuousSampler
from training.engine.text import ChatText
from training.errors import InvalidRequest, LimitExceeded, NonFiniteResult, TrainingError
from training.types import AdamParams, Datum, LoraConfig, SampledSequence, SamplingParams

PROMPT = [5, 77, 130, 9, 200]

MakeSampler = Callable[..., ContinuousSampler]


def job(
    prompt: Sequence[int] = PROMPT,
    *,
    adapter_name: str | None = None,
    num_samples: int = 1,
    prompt_logprobs: bool = False,
    **params: object,
) -> SampleJob:
    """A job of 12 tokens per sequence that nothing stops, unless ``params`` say otherwise."""
    defaults: dict[str, object] = {"max_tokens": 12, "seed": 3, "stop": ()}
    return SampleJob(
        prompt=prompt,
        sampling_params=SamplingParams(**{**defaults, **params}),
        num_samples=num_samples,
        adapter_name=adapter_name,
        prompt_logprobs=prompt_logprobs,
    )


def run_all(
    sampler: ContinuousSampler, jobs: Mapping[str, SampleJob]
) -> dict[str, SampleOutput | TrainingError]:
    for key, each in jobs.items():
        sampler.admit(key, each)
    results: dict[str, SampleOutput | TrainingError] = {}
    while sampler.active:
        results |= sampler.step()
    return results


def run(sampler: ContinuousSampler, one: SampleJob) -> SampleOutput:
    result = run_all(sampler, {"one": one})["one"]
    if isinstance(result, TrainingError):
        raise result
    return result


def sample(sampler: ContinuousSampler, one: SampleJob) -> SampledSequence:
    (sequence,) = run(sampler, one).sequences
    return sequence


@pytest.fixture
def trained(make_engine: Callable[..., TinyEngine]) -> TinyEngine:
    """An engine with three adapters of different shapes, each far from the base model."""
    engine = make_engine()
    engine.create_adapter("narrow", LoraConfig(rank=2, alpha=4.0, train_unembed=False))
    engine.create_adapter("wide", LoraConfig(rank=4, alpha=6.0))
    engine.create_adapter("other", LoraConfig(rank=2, alpha=4.0, train_mlp=False))
    for seed, name in enumerate(["narrow", "wide", "other"]):
        engine.randomise(name, seed)
    return engine


@pytest.fixture
def make_sampler(trained: TinyEngine, tied_base_model: BaseModel) -> MakeSampler:
    """A factory of samplers over the trained engine's adapters."""

    def make(**options: int) -> ContinuousSampler:
        return ContinuousSampler(
            tied_base_model,
            ChatText(tied_base_model.tokenizer, VOCAB_SIZE),
            trained.adapter_weights,
            **options,
        )

    return make


@pytest.fixture
def sampler(make_sampler: MakeSampler) -> ContinuousSampler:
    return make_sampler()


@pytest.fixture
def crowd() -> dict[str, SampleJob]:
    """Jobs of every adapter and kind, of different lengths."""
    return {
        "base": job(seed=1, num_samples=2),
        "narrow": job([7, 8], adapter_name="narrow", max_tokens=20, temperature=0.7),
        "wide": job([1] * 30, adapter_name="wide", num_samples=3, top_k=9, max_tokens=5),
        "other": job([3, 2, 1], adapter_name="other", top_p=0.8, seed=8),
        "narrow too": job([250], adapter_name="narrow", temperature=0.0),
    }


def reference_logprobs(
    reference: PeftReference, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """Log-probability of each of ``tokens`` after the prompt, from one stock forward pass."""
    whole = torch.tensor([*prompt, *tokens])
    with torch.no_grad():
        logits = reference.model(input_ids=whole[None, :-1]).logits[0, len(prompt) - 1 :]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(1, whole[len(prompt) :, None])[:, 0]


# -- against stock transformers and peft -----------------------------------------------------------


@pytest.mark.parametrize("adapter_name", ["narrow", "wide", "other"])
def test_greedy_is_what_generate_says(
    tied_folder: Path, trained: TinyEngine, sampler: ContinuousSampler, adapter_name: str
) -> None:
    reference = PeftReference(tied_folder, trained, adapter_name)
    expected = reference.model.generate(
        input_ids=torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
    )[0, len(PROMPT) :].tolist()
    # generate() keeps the end token back to reach its minimum; our job never stops, and must not
    # have wanted to.
    ours = sample(sampler, job(adapter_name=adapter_name, temperature=0.0))
    assert END_TOKEN not in ours.tokens
    assert ours.tokens == expected


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_logprobs_are_those_of_an_independent_forward_at_the_jobs_temperature(
    tied_folder: Path, trained: TinyEngine, sampler: ContinuousSampler, temperature: float
) -> None:
    reference = PeftReference(tied_folder, trained, "wide")
    one = job(adapter_name="wide", num_samples=3, temperature=temperature)
    for sequence in run(sampler, one).sequences:
        expected = reference_logprobs(reference, PROMPT, sequence.tokens, temperature)
        np.testing.assert_allclose(sequence.logprobs, expected, atol=2e-5)


def test_greedy_logprobs_are_untempered(
    tied_folder: Path, trained: TinyEngine, sampler: ContinuousSampler
) -> None:
    reference = PeftReference(tied_folder, trained, "narrow")
    ours = sample(sampler, job(adapter_name="narrow", temperature=0.0))
    expected = reference_logprobs(reference, PROMPT, ours.tokens)
    np.testing.assert_allclose(ours.logprobs, expected, atol=2e-5)


def test_top_k_and_top_p_do_not_change_a_tokens_logprob(
    tied_folder: Path, trained: TinyEngine, sampler: ContinuousSampler
) -> None:
    reference = PeftReference(tied_folder, trained, "other")
    ours = sample(sampler, job(adapter_name="other", top_k=5, top_p=0.5))
    expected = reference_logprobs(reference, PROMPT, ours.tokens)
    np.testing.assert_allclose(ours.logprobs, expected, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 4, 7, 256])
def test_prompt_logprobs_are_those_of_a_forward_pass_however_the_prompt_is_cut(
    tied_folder: Path, trained: TinyEngine, make_sampler: MakeSampler, chunk: int
) -> None:
    prompt = np.random.default_rng(0).integers(0, VOCAB_SIZE, 29).tolist()
    one = job(prompt, adapter_name="wide", prompt_logprobs=True, temperature=0.3)
    got = run(make_sampler(prefill_chunk_tokens=chunk), one).prompt_logprobs
    assert got is not None
    reference = PeftReference(tied_folder, trained, "wide")
    expected = reference_logprobs(reference, prompt[:1], prompt[1:])
    assert np.isnan(got[0])
    np.testing.assert_allclose(got[1:], expected, atol=2e-5)


def test_prompt_logprobs_are_what_forward_says(
    trained: TinyEngine, sampler: ContinuousSampler
) -> None:
    one = job(adapter_name="narrow", prompt_logprobs=True)
    datum = Datum(
        model_input=np.asarray(PROMPT[:-1], dtype=np.int32),
        loss_fn_inputs={"target_tokens": np.asarray(PROMPT[1:])},
    )
    forward = trained.train_one("narrow", [datum], forward_only=True)
    got = run(sampler, one).prompt_logprobs
    assert got is not None
    np.testing.assert_allclose(got[1:], forward.logprobs[0], atol=2e-5)


def test_prompt_logprobs_are_absent_unless_asked_for(sampler: ContinuousSampler) -> None:
    assert run(sampler, job()).prompt_logprobs is None


# -- nothing depends on what shares the steps ------------------------------------------------------


def test_a_job_in_a_crowd_is_what_it_is_alone_to_the_bit(
    make_sampler: MakeSampler, crowd: dict[str, SampleJob]
) -> None:
    together = run_all(make_sampler(), crowd)
    for key, each in crowd.items():
        alone = run(make_sampler(), each)
        crowded = together[key]
        assert isinstance(crowded, SampleOutput)
        assert crowded.sequences == alone.sequences


def test_a_job_that_comes_late_is_what_it_is_alone(
    make_sampler: MakeSampler, crowd: dict[str, SampleJob]
) -> None:
    late = crowd.pop("other")
    sampler = make_sampler(prefill_chunk_tokens=4)
    for key, each in crowd.items():
        sampler.admit(key, each)
    for _ in range(5):
        sampler.step()
    together = run_all(sampler, {"late": late})["late"]
    assert isinstance(together, SampleOutput)
    assert together.sequences == run(make_sampler(prefill_chunk_tokens=4), late).sequences


def test_sample_i_depends_on_the_seed_and_i_only(make_sampler: MakeSampler) -> None:
    many = run(make_sampler(), job(num_samples=6)).sequences
    few = run(make_sampler(), job(num_samples=2)).sequences
    assert many[:2] == few
    assert len({tuple(sequence.tokens) for sequence in many}) == 6
    assert run(make_sampler(), job(num_samples=6, seed=4)).sequences[0] != many[0]


def test_sampling_neither_reads_nor_moves_the_global_random_state(
    make_sampler: MakeSampler,
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample(make_sampler(), job())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert sample(make_sampler(), job()) == first


def test_training_after_admission_does_not_change_a_job(
    trained: TinyEngine, make_sampler: MakeSampler, make_datum: Callable[..., Datum]
) -> None:
    expected = sample(make_sampler(), job(adapter_name="wide"))
    sampler = make_sampler()
    sampler.admit("before", job(adapter_name="wide"))
    sampler.step()
    sampler.step()
    sampler.admit("before too", job(adapter_name="wide"))
    trained.train_one("wide", [make_datum(9)])
    trained.optim_step("wide", AdamParams(learning_rate=0.3))
    results = run_all(sampler, {"after": job(adapter_name="wide")})
    sequences = {
        key: result.sequences[0]
        for key, result in results.items()
        if isinstance(result, SampleOutput)
    }
    assert sequences["before"] == sequences["before too"] == expected
    assert sequences["after"] != expected
    assert sequences["after"] == sample(make_sampler(), job(adapter_name="wide"))


def test_an_adapter_dropped_after_admission_serves_the_job_to_its_end(
    trained: TinyEngine, make_sampler: MakeSampler
) -> None:
    expected = sample(make_sampler(), job(adapter_name="wide"))
    sampler = make_sampler()
    sampler.admit("one", job(adapter_name="wide"))
    trained.drop_adapter("wide")
    result = run_all(sampler, {})["one"]
    assert isinstance(result, SampleOutput)
    assert result.sequences == [expected]


def test_sampling_leaves_training_as_it_was(
    trained: TinyEngine, sampler: ContinuousSampler, make_datum: Callable[..., Datum]
) -> None:
    """Weights converted for sampling must be fit for a backward pass later."""
    run(sampler, job(adapter_name="wide"))
    state = trained.adapter_state("wide")
    trained.train_one("wide", [make_datum(9)])
    assert np.any(trained.grad("wide"))
    assert not np.any(state["grad"])
    assert np.array_equal(trained.adapter_state("wide")["weights"], state["weights"])


# -- ends ------------------------------------------------------------------------------------------


def free_run(make_sampler: MakeSampler) -> list[SampledSequence]:
    return run(make_sampler(), job(num_samples=8, max_tokens=120)).sequences


def test_none_stops_at_the_models_end_token_and_nothing_stops_an_empty_list(
    make_sampler: MakeSampler,
) -> None:
    free = free_run(make_sampler)
    stopped = run(make_sampler(), job(num_samples=8, max_tokens=120, stop=None)).sequences
    assert any(END_TOKEN in sequence.tokens[:-1] for sequence in free)
    for unstopped, sequence in zip(free, stopped, strict=True):
        assert (len(unstopped.tokens), unstopped.stop_reason) == (120, "length")
        if END_TOKEN in unstopped.tokens:
            end = unstopped.tokens.index(END_TOKEN) + 1
            assert sequence.tokens == unstopped.tokens[:end]
            assert sequence.logprobs == unstopped.logprobs[:end]
            assert sequence.stop_reason == "stop"
        else:
            assert sequence == unstopped


def test_stop_ids_stop_and_are_the_only_ones_that_do(make_sampler: MakeSampler) -> None:
    free = free_run(make_sampler)
    after_end = next(s.tokens for s in free if END_TOKEN in s.tokens[:60])
    stop = next(t for t in after_end[60:] if t not in after_end[:60])
    stopped = run(make_sampler(), job(num_samples=8, max_tokens=120, stop=(stop,))).sequences
    for unstopped, sequence in zip(free, stopped, strict=True):
        end = [*unstopped.tokens, stop].index(stop) + 1
        assert sequence.tokens == unstopped.tokens[:end]
    assert [s.stop_reason for s in stopped].count("stop") >= 1


def test_a_stop_string_is_found_across_tokens_and_left_out_of_the_text(
    make_sampler: MakeSampler,
) -> None:
    free = free_run(make_sampler)[0]
    # Every token of the tiny model is one byte, so two characters are never one token.
    at = next(i for i in range(5, len(free.text)) if free.text[i : i + 2].isascii())
    stop = free.text[at : at + 2]
    ours = sample(make_sampler(), job(max_tokens=120, stop=("never said!", stop)))
    assert ours.text == free.text[: free.text.index(stop)]
    assert ours.stop_reason == "stop"
    assert ours.tokens == free.tokens[: len(ours.tokens)]
    assert make_tokenizer().decode(ours.tokens, skip_special_tokens=True) == ours.text + stop


def test_an_end_token_stops_a_job_with_stop_strings_too(make_sampler: MakeSampler) -> None:
    for_none = run(make_sampler(), job(num_samples=8, max_tokens=120, stop=None)).sequences
    strings = job(num_samples=8, max_tokens=120, stop=("never said!",))
    assert run(make_sampler(), strings).sequences == for_none


def test_text_is_that_of_the_tokens_without_special_ones(make_sampler: MakeSampler) -> None:
    symbols = make_tokenizer().convert_ids_to_tokens(range(VOCAB_SIZE))
    for sequence in free_run(make_sampler):
        kept = [symbols[t] for t in sequence.tokens if t >= len(SPECIAL_TOKENS)]
        text = bytes(map(byte_of, kept)).decode(errors="replace")
        assert sequence.text == text


def byte_of(symbol: str) -> int:
    """GPT-2's table: printable bytes stand for themselves, the others are moved up in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printable]
    return ord(symbol) if ord(symbol) in printable else moved[ord(symbol) - 256]


def test_without_max_tokens_the_limit_and_the_context_end_a_sequence(
    make_sampler: MakeSampler,
) -> None:
    limited = make_sampler(max_tokens_limit=7)
    assert len(sample(limited, job(max_tokens=None)).tokens) == 7
    near_the_end = [4] * 500
    ours = sample(make_sampler(), job(near_the_end, max_tokens=None))
    assert (len(ours.tokens), ours.stop_reason) == (12, "length")  # a context of 512


def test_max_tokens_beyond_the_context_is_cut_to_it(make_sampler: MakeSampler) -> None:
    ours = sample(make_sampler(), job([4] * 509, max_tokens=100))
    assert (len(ours.tokens), ours.stop_reason) == (3, "length")


# -- room ------------------------------------------------------------------------------------------


def test_a_prompt_longer_than_a_chunk_is_read_in_several_steps(make_sampler: MakeSampler) -> None:
    prompt = np.random.default_rng(1).integers(0, VOCAB_SIZE, 40).tolist()
    whole = sample(make_sampler(), job(prompt, temperature=0.0))
    cut = make_sampler(prefill_chunk_tokens=16)
    cut.admit("one", job(prompt, temperature=0.0))
    num_steps, results = 0, {}
    while cut.active:
        results |= cut.step()
        num_steps += 1
    assert num_steps == 3 + 11  # chunks of 16, 16 and 8, the last of which samples too
    assert results["one"].sequences[0].tokens == whole.tokens
    np.testing.assert_allclose(results["one"].sequences[0].logprobs, whole.logprobs, atol=2e-5)


def test_short_prompts_are_read_together(make_sampler: MakeSampler) -> None:
    jobs = {str(i): job([i + 3] * (i + 2), seed=i) for i in range(4)}  # 14 tokens in all
    sampler = make_sampler(prefill_chunk_tokens=32)
    for key, each in jobs.items():
        sampler.admit(key, each)
    num_steps, results = 0, {}
    while sampler.active:
        results |= sampler.step()
        num_steps += 1
    assert num_steps == 1 + 11
    for key, each in jobs.items():
        alone = run(make_sampler(prefill_chunk_tokens=32), each)
        assert results[key].sequences == alone.sequences


def test_a_long_prompt_and_the_active_jobs_take_turns(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(prefill_chunk_tokens=8)
    sampler.admit("short", job(max_tokens=6))
    sampler.step()  # reads the short prompt and samples its first token
    sampler.admit("long", job([9] * 200))
    results: dict[str, object] = {}
    for _ in range(10):  # five more tokens in turns with five chunks
        results |= sampler.step()
    assert list(results) == ["short"]


def test_a_job_waits_while_the_cache_is_full_and_then_runs(
    make_sampler: MakeSampler, crowd: dict[str, SampleJob]
) -> None:
    sampler = make_sampler(cache_tokens=128)
    first = job([6] * 100, max_tokens=20)
    sampler.admit("first", first)
    sampler.admit("second", crowd["base"])
    results: dict[str, SampleOutput | TrainingError] = {}
    order: list[str] = []
    while sampler.active:
        step = sampler.step()
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


def test_a_job_that_can_never_fit_is_refused_with_the_numbers(make_sampler: MakeSampler) -> None:
    sampler = make_sampler(cache_tokens=128, max_sequences=4)
    with pytest.raises(LimitExceeded, match=r"2 sequences of 5 prompt and 90 sampled .* 128"):
        sampler.admit("one", job(num_samples=2, max_tokens=90))
    with pytest.raises(LimitExceeded, match="num_samples: 5 is more than the 4"):
        sampler.admit("one", job(num_samples=5, max_tokens=1))
    assert sampler.active == 0


def test_without_max_tokens_a_job_takes_what_the_cache_has(make_sampler: MakeSampler) -> None:
    ours = run(make_sampler(cache_tokens=64), job(num_samples=2, max_tokens=None)).sequences
    assert [len(sequence.tokens) for sequence in ours] == [32 - 5 + 1] * 2


# -- failures and cancellation ---------------------------------------------------------------------


def test_a_job_whose_logits_are_not_finite_fails_alone(
    trained: TinyEngine, make_sampler: MakeSampler, crowd: dict[str, SampleJob]
) -> None:
    expected = run_all(make_sampler(), crowd)
    trained.create_adapter("broken", LoraConfig(rank=2))
    flat = trained.adapter_state("broken")["weights"]
    trained.set_weights("broken", np.full_like(flat, np.nan))
    results = run_all(make_sampler(), {**crowd, "bad": job(adapter_name="broken", num_samples=2)})
    assert isinstance(results.pop("bad"), NonFiniteResult)
    for key, result in results.items():
        assert isinstance(result, SampleOutput)
        assert result.sequences == expected[key].sequences


def test_cancelling_frees_the_cache_and_leaves_the_others_alone(
    make_sampler: MakeSampler, crowd: dict[str, SampleJob]
) -> None:
    sampler = make_sampler(cache_tokens=256, prefill_chunk_tokens=8)
    sampler.admit("decoding", job(num_samples=2, max_tokens=20))
    sampler.admit("stays", crowd["other"])
    for _ in range(6):
        sampler.step()
    sampler.admit("prefilling", job([1] * 60))
    sampler.step()
    sampler.step()
    sampler.admit("waiting", job([2] * 200))
    for key in ("decoding", "prefilling", "waiting", "never heard of"):
        sampler.cancel(key)
    assert sampler.active == 1
    results = run_all(sampler, {})
    assert list(results) == ["stays"]
    assert results["stays"].sequences == run(make_sampler(), crowd["other"]).sequences
    whole_cache = job([2] * 200, max_tokens=57)
    assert len(sample(sampler, whole_cache).tokens) == 57


def test_a_sampler_without_jobs_does_nothing(sampler: ContinuousSampler) -> None:
    assert sampler.step() == {}
    assert sampler.active == 0


def test_a_key_names_one_job_at_a_time(sampler: ContinuousSampler) -> None:
    sampler.admit("one", job())
    with pytest.raises(ValueError, match="'one'"):
        sampler.admit("one", job())


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (job([]), "prompt: empty"),
        (job([1, VOCAB_SIZE]), rf"prompt\[1\]: token {VOCAB_SIZE} is not in the vocabulary"),
        (job([-1]), r"prompt\[0\]: token -1"),
        (job([1] * 512), "prompt: 512 tokens leave no room in the context of 512"),
        (job(num_samples=0), "num_samples: 0"),
        (job(max_tokens=0), "max_tokens: 0"),
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
        (job(adapter_name="unheard of"), "unheard of"),
    ],
)
def test_a_bad_job_is_refused_by_name_and_not_admitted(
    sampler: ContinuousSampler, bad: SampleJob, complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        sampler.admit("bad", bad)
    assert sampler.active == 0
