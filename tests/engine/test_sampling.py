"""Samples equal those of stock transformers and peft, with any batch-mates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.reference import PeftReference, TinyTrainer
from tests.engine.sampling_jobs import PROMPT, MakeSampler, job, run, run_all, sample
from tests.tiny_model import END_TOKEN, SPECIAL_TOKENS, VOCAB_SIZE, make_tokenizer
from training.engine.interface import SampleJob, SampleOutput
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.types import Datum, SampledSequence


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


@pytest.mark.parametrize("version", ["narrow", "wide", "other"])
def test_greedy_is_what_generate_says(
    tied_folder: Path, trained: TinyTrainer, sampler: ContinuousSampler, version: str
) -> None:
    reference = PeftReference(tied_folder, trained, version)
    expected = reference.model.generate(
        input_ids=torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
    )[0, len(PROMPT) :].tolist()
    # generate() keeps the end token back to reach its minimum; our job never stops, and must not
    # have wanted to.
    ours = sample(sampler, job(version=version, temperature=0.0))
    assert END_TOKEN not in ours.tokens
    assert ours.tokens == expected


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_logprobs_are_those_of_an_independent_forward_at_the_jobs_temperature(
    tied_folder: Path, trained: TinyTrainer, sampler: ContinuousSampler, temperature: float
) -> None:
    reference = PeftReference(tied_folder, trained, "wide")
    one = job(version="wide", num_samples=3, temperature=temperature)
    for sequence in run(sampler, one).sequences:
        expected = reference_logprobs(reference, PROMPT, sequence.tokens, temperature)
        np.testing.assert_allclose(sequence.logprobs, expected, atol=2e-5)


def test_greedy_logprobs_are_untempered(
    tied_folder: Path, trained: TinyTrainer, sampler: ContinuousSampler
) -> None:
    reference = PeftReference(tied_folder, trained, "narrow")
    ours = sample(sampler, job(version="narrow", temperature=0.0))
    expected = reference_logprobs(reference, PROMPT, ours.tokens)
    np.testing.assert_allclose(ours.logprobs, expected, atol=2e-5)


def test_top_k_and_top_p_do_not_change_a_tokens_logprob(
    tied_folder: Path, trained: TinyTrainer, sampler: ContinuousSampler
) -> None:
    reference = PeftReference(tied_folder, trained, "other")
    ours = sample(sampler, job(version="other", top_k=5, top_p=0.5))
    expected = reference_logprobs(reference, PROMPT, ours.tokens)
    np.testing.assert_allclose(ours.logprobs, expected, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 4, 7, 256])
def test_prompt_logprobs_are_those_of_a_forward_pass_however_the_prompt_is_cut(
    tied_folder: Path, trained: TinyTrainer, make_sampler: MakeSampler, chunk: int
) -> None:
    prompt = np.random.default_rng(0).integers(0, VOCAB_SIZE, 29).tolist()
    one = job(prompt, version="wide", prompt_logprobs=True, temperature=0.3)
    got = run(make_sampler(prefill_chunk_tokens=chunk), one).prompt_logprobs
    assert got is not None
    reference = PeftReference(tied_folder, trained, "wide")
    expected = reference_logprobs(reference, prompt[:1], prompt[1:])
    assert np.isnan(got[0])
    np.testing.assert_allclose(got[1:], expected, atol=2e-5)


def test_prompt_logprobs_are_what_forward_says(
    trained: TinyTrainer, sampler: ContinuousSampler
) -> None:
    one = job(version="narrow", prompt_logprobs=True)
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
        sampler.submit(key, each)
    for _ in range(5):
        sampler.poll(0)
    together = run_all(sampler, {"late": late})["late"]
    assert isinstance(together, SampleOutput)
    assert together.sequences == run(make_sampler(prefill_chunk_tokens=4), late).sequences


def test_sampling_neither_reads_nor_moves_the_global_random_state(
    make_sampler: MakeSampler,
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample(make_sampler(), job())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert sample(make_sampler(), job()) == first


def test_sampling_leaves_training_as_it_was(
    trained: TinyTrainer, sampler: ContinuousSampler, make_datum: Callable[..., Datum]
) -> None:
    """Weights converted for sampling must be fit for a backward pass later."""
    run(sampler, job(version="wide"))
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


def test_a_stop_token_stops_beside_the_others_and_is_not_in_the_text(
    make_sampler: MakeSampler,
) -> None:
    free = free_run(make_sampler)
    stop = free[0].tokens[40]
    ends = {"stop_token_ids": (stop,), "num_samples": 8, "max_tokens": 120}
    for natural in (None, ("never said!",)):
        sequences = run(make_sampler(), job(stop=natural, **ends)).sequences
        for unstopped, sequence in zip(free, sequences, strict=True):
            marks = [i for i, t in enumerate(unstopped.tokens) if t in (stop, END_TOKEN)]
            length = marks[0] + 1 if marks else 120
            assert sequence.tokens == unstopped.tokens[:length]
            said = sequence.tokens[:-1] if sequence.tokens[-1] == stop else sequence.tokens
            assert sequence.text == make_tokenizer().decode(said, skip_special_tokens=True)
        assert any(s.tokens[-1] == stop for s in sequences)


def test_a_stop_token_is_not_told_while_others_go_on(make_sampler: MakeSampler) -> None:
    stop = next(t for t in free_run(make_sampler)[0].tokens if t >= len(SPECIAL_TOKENS))
    sampler = make_sampler()
    sampler.submit("job", job(num_samples=8, max_tokens=120, stop_token_ids=(stop,)))
    told = sampler.progress("job")
    while not (finished := sampler.poll(0)):
        told = sampler.progress("job")
    output = finished["job"]
    assert isinstance(output, SampleOutput)
    assert len({len(sequence.tokens) for sequence in output.sequences}) > 1
    for text, sequence in zip(told, output.sequences, strict=True):
        assert sequence.text.startswith(text)


def test_end_tokens_end_nothing_where_they_are_to_be_ignored(make_sampler: MakeSampler) -> None:
    ignoring = job(num_samples=8, max_tokens=120, stop=None, ignore_eos=True)
    assert run(make_sampler(), ignoring).sequences == free_run(make_sampler)


@pytest.mark.parametrize("chunk", [3, 256])
def test_without_a_token_to_sample_a_prompt_is_only_read(
    make_sampler: MakeSampler, chunk: int
) -> None:
    for prompt in (PROMPT, [7], [4] * 512):  # the last one fills the context
        one = job(prompt, prompt_logprobs=True, num_samples=2, max_tokens=0)
        output = run(make_sampler(prefill_chunk_tokens=chunk), one)
        assert [(s.tokens, s.text, s.stop_reason) for s in output.sequences] == [
            ([], "", "length")
        ] * 2
        reading = job(prompt[:511], prompt_logprobs=True, max_tokens=1)
        expected = run(make_sampler(), reading).prompt_logprobs
        assert output.prompt_logprobs is not None
        assert expected is not None
        np.testing.assert_allclose(output.prompt_logprobs[:511], expected, atol=2e-5)


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


def test_the_text_of_a_special_token_stops_where_its_id_does(make_sampler: MakeSampler) -> None:
    """Token 1 begins a turn, does not end a sequence by itself, and is not part of the text."""
    free = run(make_sampler(), job(num_samples=8, max_tokens=120)).sequences
    assert any(1 in sequence.tokens for sequence in free)
    by_id = run(make_sampler(), job(num_samples=8, max_tokens=120, stop=(1, END_TOKEN))).sequences
    by_text = run(
        make_sampler(), job(num_samples=8, max_tokens=120, stop=(SPECIAL_TOKENS[1],))
    ).sequences
    assert [s.tokens for s in by_text] == [s.tokens for s in by_id]
    assert [s.stop_reason for s in by_text] == [s.stop_reason for s in by_id]
    assert [s.text for s in by_text] == [s.text for s in by_id]


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
