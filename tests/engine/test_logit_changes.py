"""Biases and penalties: the formulas of OpenAI and of transformers, and no other number moves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from tests.engine.reference import PeftReference, TinyTrainer
from tests.engine.sampling_jobs import PROMPT, MakeSampler, job, run, sample
from tests.engine.test_sampling import reference_logprobs
from tests.engine.test_sampling_choice import logits_of
from tests.tiny_model import VOCAB_SIZE
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.engine.sampler.logit_changes import changed_logits
from training.engine.sampler.logits import choose_tokens
from training.errors import InvalidRequest
from training.types import SamplingParams

SAID = [4, 9, 4, 31, 4]


def test_frequency_and_presence_are_openais_formula() -> None:
    logits = logits_of(1)
    params = SamplingParams(frequency_penalty=0.4, presence_penalty=-1.5)
    expected = logits.numpy().copy()
    for token, count in Counter(SAID).items():
        expected[token] -= count * 0.4 + (-1.5 if count > 0 else 0.0)
    got = changed_logits(logits, params, [1, 2, 3], SAID)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_repetition_is_what_transformers_does_to_prompt_and_text(penalty: float) -> None:
    logits = logits_of(2)
    assert (logits[SAID] < 0).any()
    assert (logits[[0, 1, 2]] > 0).any()
    seen = torch.tensor([[0, 1, 2, *SAID]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits[None].clone())[0]
    got = changed_logits(logits, SamplingParams(repetition_penalty=penalty), [0, 1, 2], SAID)
    torch.testing.assert_close(got, expected)


def test_a_bias_is_added_to_its_tokens_only() -> None:
    logits = logits_of(3)
    got = changed_logits(logits, SamplingParams(logit_bias=((5, 2.5), (7, -100.0))), [1], [])
    expected = logits.clone()
    expected[5] += 2.5
    expected[7] -= 100
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"min_p": 0.1}])
def test_a_changed_row_is_drawn_as_if_its_logits_had_been_those(cut: dict[str, float]) -> None:
    logits, others = logits_of(4), logits_of(5)
    params = SamplingParams(temperature=0.8, **cut)
    for uniform in np.linspace(0, 0.999, 40):
        plain, changed = choose_tokens(
            torch.stack([others, logits]), [params] * 2, [uniform] * 2, changed={1: others}
        )
        assert plain.token == changed.token
        own = (logits / 0.8).log_softmax(-1)[changed.token]
        assert changed.logprob == pytest.approx(float(own), abs=1e-6)


def test_a_greedy_job_with_a_repetition_penalty_is_what_generate_says(
    tied_folder: Path, trained: TinyTrainer, sampler: ContinuousSampler
) -> None:
    reference = PeftReference(tied_folder, trained, "wide")
    expected = reference.model.generate(
        input_ids=torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.6,
    )[0, len(PROMPT) :].tolist()
    params = {"version": "wide", "temperature": 0.0}
    ours = sample(sampler, job(repetition_penalty=1.6, **params))
    assert ours.tokens == expected
    assert ours.tokens != sample(sampler, job(**params)).tokens
    # Told are the model's own log-probabilities.
    own = reference_logprobs(reference, PROMPT, ours.tokens)
    np.testing.assert_allclose(ours.logprobs, own, atol=2e-5)


def test_nobody_elses_tokens_change(make_sampler: MakeSampler) -> None:
    sampler = make_sampler()
    alone = run(make_sampler(), job(num_samples=2))
    sampler.submit("biased", job(seed=5, logit_bias=((17, 100.0),)))
    sampler.submit("plain", job(num_samples=2))
    results = {}
    while sampler.active:
        results |= sampler.poll(0)
    assert results["plain"].sequences == alone.sequences
    assert results["biased"].sequences[0].tokens == [17] * 12


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty: 2.1 is not from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty: nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0 is not from 0.01 to 100"),
        ({"logit_bias": ((VOCAB_SIZE, 1.0),)}, f"logit_bias.{VOCAB_SIZE}: token {VOCAB_SIZE} is"),
        ({"logit_bias": ((3, 101.0),)}, "logit_bias.3: 101.0 is not from -100 to 100"),
        ({"min_p": 1.1}, "min_p: 1.1 is not from 0 to 1"),
        ({"stop_token_ids": (VOCAB_SIZE,)}, f"stop_token_ids: token {VOCAB_SIZE} is not in"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(
    sampler: ContinuousSampler, params: dict[str, object], complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        sampler.submit("bad", job(**params))
    assert sampler.active == 0
