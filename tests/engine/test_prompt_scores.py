"""The log-probabilities that few ask for, against a stock forward pass of the whole sequence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.reference import PeftReference, TinyTrainer
from tests.engine.sampling_jobs import MakeSampler, job, run
from tests.tiny_model import VOCAB_SIZE
from training.engine.interface import SampleJob, SampleOutput
from training.errors import InvalidRequest
from training.types import NO_DATA_LOGPROB, ScoringParams

PROMPT = [5, 77, 130, 9, 200, 31, 8, 64, 90, 12]
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture
def expected(trained: TinyTrainer, tied_folder: Path) -> torch.Tensor:
    """(P, V) log-probabilities under the adapter; row i is of what follows prompt[: i + 1]."""
    reference = PeftReference(tied_folder, trained, "wide")
    with torch.no_grad():
        return reference.model(input_ids=torch.tensor(PROMPT)[None]).logits[0].log_softmax(-1)


def scored(prompt_logprobs: bool = False, num_samples: int = 1, **scoring: object) -> SampleJob:
    asked = job(PROMPT, version="wide", prompt_logprobs=prompt_logprobs, num_samples=num_samples)
    return replace(asked, scoring=ScoringParams(**scoring))


def outputs(make_sampler: MakeSampler, asked: SampleJob) -> list[SampleOutput]:
    """With the prompt read in one piece and in several."""
    return [run(make_sampler(prefill_chunk_tokens=chunk), asked) for chunk in (256, 4)]


def test_the_likeliest_prompt_tokens_are_those_of_a_forward_pass(
    make_sampler: MakeSampler, expected: torch.Tensor
) -> None:
    values, tokens = expected[:-1].topk(3)
    for output in outputs(make_sampler, scored(topk_prompt_logprobs=3)):
        top = output.scores.top
        assert top is not None
        assert top.token_ids.shape == (len(PROMPT), 3)
        assert top.token_ids[0].tolist() == [0, 0, 0]
        assert top.logprobs[0].tolist() == [NO_DATA_LOGPROB] * 3
        np.testing.assert_array_equal(top.token_ids[1:], tokens)
        np.testing.assert_allclose(top.logprobs[1:], values, **TOLERANCE)
        assert output.prompt_logprobs is None


def test_only_the_last_tokens_are_scored_where_only_they_are_asked_for(
    make_sampler: MakeSampler, expected: torch.Tensor
) -> None:
    asked = scored(True, prompt_logprobs_last_n=3, topk_prompt_logprobs=2)
    own = expected[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    for output in outputs(make_sampler, asked):
        assert output.prompt_logprobs is not None
        assert np.isnan(output.prompt_logprobs[:-3]).all()
        np.testing.assert_allclose(output.prompt_logprobs[-3:], own[-3:], **TOLERANCE)
        top = output.scores.top
        assert top is not None
        assert (top.logprobs[:-3] == NO_DATA_LOGPROB).all()
        np.testing.assert_allclose(top.logprobs[-3:], expected[-4:-1].topk(2)[0], **TOLERANCE)


def test_named_tokens_are_scored_in_the_row_before_and_minus_1_is_not(
    make_sampler: MakeSampler, expected: torch.Tensor
) -> None:
    targets = np.full((len(PROMPT) - 1, 2), -1, np.int64)
    targets[2] = [7, -1]
    targets[5] = [11, 250]
    targets[8] = [-1, 0]
    for output in outputs(make_sampler, scored(target_prompt_logprobs=targets)):
        got = output.scores.target_logprobs
        assert got is not None
        assert (got[targets < 0] == 0.0).all()
        rows, columns = np.nonzero(targets >= 0)
        wanted = expected[rows, targets[rows, columns]]
        np.testing.assert_allclose(got[rows, columns], wanted, **TOLERANCE)


def test_last_n_does_not_cut_what_else_is_asked(
    make_sampler: MakeSampler, expected: torch.Tensor
) -> None:
    targets = np.full((len(PROMPT) - 1, 1), 4, np.int64)
    asked = scored(
        True, prompt_logprobs_last_n=1, target_prompt_logprobs=targets, prompt_alt_tokens_k=2
    )
    for output in outputs(make_sampler, asked):
        assert output.prompt_logprobs is not None
        assert np.isnan(output.prompt_logprobs[:-1]).all()
        np.testing.assert_allclose(
            output.scores.target_logprobs[:, 0], expected[:-1, 4], **TOLERANCE
        )
        assert (output.scores.alternatives[1] < 0).all()


def test_alternatives_are_drawn_from_the_models_distribution_and_scored_by_it(
    make_sampler: MakeSampler, expected: torch.Tensor
) -> None:
    one, pieces = outputs(make_sampler, scored(prompt_alt_tokens_k=3000))
    tokens, logprobs = one.scores.alternatives
    rows = torch.arange(len(PROMPT) - 1)[:, None]

    np.testing.assert_array_equal(tokens, pieces.scores.alternatives[0])
    np.testing.assert_allclose(logprobs, expected[rows, torch.from_numpy(tokens)], **TOLERANCE)
    for row, wanted in zip(tokens, expected[:-1].exp().numpy(), strict=True):
        seen = np.bincount(row, minlength=VOCAB_SIZE) / len(row)
        # five standard deviations of a share among 3000 draws
        assert (np.abs(seen - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / 3000) + 1e-3).all()


def test_greedy_alternatives_are_the_likeliest_token(
    make_sampler: MakeSampler, expected: torch.Tensor
) -> None:
    asked = scored(prompt_alt_tokens_k=2)
    asked = replace(asked, sampling_params=replace(asked.sampling_params, temperature=0.0))
    tokens, _ = run(make_sampler(), asked).scores.alternatives

    likeliest = expected[:-1].argmax(-1)
    np.testing.assert_array_equal(tokens, torch.stack([likeliest, likeliest], dim=1))


def test_the_likeliest_sampled_tokens_are_of_the_tempered_distribution(
    make_sampler: MakeSampler, trained: TinyTrainer, tied_folder: Path
) -> None:
    asked = scored(num_samples=2, topk_sample_logprobs=4)
    asked = replace(asked, sampling_params=replace(asked.sampling_params, temperature=0.6))
    reference = PeftReference(tied_folder, trained, "wide")

    for sequence in run(make_sampler(), asked).sequences:
        whole = torch.tensor([*PROMPT, *sequence.tokens])
        with torch.no_grad():
            logits = reference.model(input_ids=whole[None, :-1]).logits[0, len(PROMPT) - 1 :]
        values, tokens = (logits / 0.6).log_softmax(-1).topk(4)
        assert sequence.top is not None
        np.testing.assert_array_equal(sequence.top.token_ids, tokens)
        np.testing.assert_allclose(sequence.top.logprobs, values, atol=5e-5, rtol=1e-4)


def test_scores_change_nothing_of_what_is_sampled(make_sampler: MakeSampler) -> None:
    asked = scored(True, topk_prompt_logprobs=2, topk_sample_logprobs=2, prompt_alt_tokens_k=2)
    plain, with_scores = (run(make_sampler(), each) for each in (scored(), asked))

    assert plain.sequences[0].tokens == with_scores.sequences[0].tokens
    assert plain.sequences[0].logprobs == with_scores.sequences[0].logprobs


def test_a_vocabulary_smaller_than_k_is_padded(make_sampler: MakeSampler) -> None:
    asked = scored(topk_prompt_logprobs=VOCAB_SIZE + 2, topk_sample_logprobs=VOCAB_SIZE + 1)
    output = run(make_sampler(), asked)

    for top, extra in ((output.scores.top, 2), (output.sequences[0].top, 1)):
        assert top is not None
        assert (top.token_ids[:, -extra:] == 0).all()
        assert (top.logprobs[:, -extra:] == NO_DATA_LOGPROB).all()
        np.testing.assert_allclose(np.exp(top.logprobs[1:, :-extra]).sum(1), 1.0, rtol=1e-4)


def test_a_token_out_of_the_vocabulary_is_refused_by_name(make_sampler: MakeSampler) -> None:
    targets = np.full((len(PROMPT) - 1, 1), VOCAB_SIZE, np.int64)

    with pytest.raises(InvalidRequest, match="target_prompt_logprobs: token 259"):
        make_sampler().submit("one", scored(target_prompt_logprobs=targets))
