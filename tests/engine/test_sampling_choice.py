"""One token from one row of logits: against a plain sort in numpy, and against the distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from training.engine.sampler.logits import UniformNumbers, choose_tokens
from training.types import SamplingParams

VOCAB = 40


def logits_of(seed: int, vocab_size: int = VOCAB, spread: float = 1.5) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy((spread * rng.normal(size=vocab_size)).astype(np.float32))


def probabilities(logits: torch.Tensor, params: SamplingParams) -> NDArray[np.float64]:
    """The distribution that the parameters mean, by sorting everything."""
    scaled = logits.double().numpy() / params.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if params.top_k != -1:
        p[order[params.top_k :]] = 0.0
        p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= params.top_p]] = 0.0
    return p / p.sum()


def draw(logits: torch.Tensor, params: SamplingParams, num_draws: int) -> NDArray[np.int64]:
    """How often each token is drawn by the sequences 0, 1, 2... of one seed."""
    uniforms = [UniformNumbers(11, number).next() for number in range(num_draws)]
    choices = choose_tokens(logits.expand(num_draws, -1), [params] * num_draws, uniforms)
    return np.bincount([choice.token for choice in choices], minlength=len(logits))


def chi_square(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    """Standard deviations above what chance gives; bins of fewer than five go into one."""
    likely = expected >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=3.0),
        SamplingParams(top_k=6),
        SamplingParams(top_p=0.7),
        SamplingParams(temperature=1.3, top_k=12, top_p=0.8),
    ],
)
def test_tokens_are_drawn_as_often_as_the_distribution_says(params: SamplingParams) -> None:
    num_draws = 6000
    logits = logits_of(5)
    counts = draw(logits, params, num_draws)
    expected = num_draws * probabilities(logits, params)
    assert not np.any(counts[expected == 0])
    assert chi_square(counts, expected) < 4
    # The same counts do not fit another temperature.
    hotter = SamplingParams(
        temperature=2 * params.temperature, top_k=params.top_k, top_p=params.top_p
    )
    wrong = num_draws * probabilities(logits, hotter)
    assert np.any(counts[wrong == 0]) or chi_square(counts, wrong) > 8


@given(
    seed=st.integers(0, 10_000),
    uniform=st.floats(0, 1, exclude_max=True),
    temperature=st.floats(0.05, 5),
    top_k=st.one_of(st.just(-1), st.integers(2, 3000)),
    top_p=st.floats(0.01, 1),
)
@settings(deadline=None, max_examples=60)
def test_a_cut_distribution_is_inverted_as_a_full_sort_would(
    seed: int, uniform: float, temperature: float, top_k: int, top_p: float
) -> None:
    """Also where the likeliest thousand are not enough to reach top_p."""
    logits = logits_of(seed, vocab_size=2500, spread=0.3)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    (choice,) = choose_tokens(logits[None], [params], [uniform])
    p = probabilities(logits, params)
    is_cut = top_k != -1 or top_p < 1
    order = np.argsort(-p, kind="stable") if is_cut else np.arange(len(p))
    place = int(np.flatnonzero(order == choice.token)[0])
    above = float(p[order[:place]].sum())
    # The uniform number falls into the chosen token's share, up to float32's rounding.
    assert above - 1e-5 <= uniform <= above + p[choice.token] + 1e-5


@given(
    seed=st.integers(0, 10_000),
    uniform=st.floats(0, 1, exclude_max=True),
    temperature=st.floats(0.2, 3),
    top_k=st.one_of(st.just(-1), st.integers(2, 3000)),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 1)),
    min_p=st.floats(1e-4, 1),
)
@settings(deadline=None, max_examples=60)
def test_min_p_keeps_and_draws_what_transformers_warpers_leave(
    seed: int, uniform: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = logits_of(seed, vocab_size=2500)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k != -1:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    warpers.append(MinPLogitsWarper(min_p))
    p = warpers(torch.zeros(1, 1, dtype=torch.int64), logits[None])[0].double().softmax(0).numpy()
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    (choice,) = choose_tokens(logits[None], [params], [uniform])
    order = np.argsort(-p, kind="stable")
    place = int(np.flatnonzero(order == choice.token)[0])
    above = float(p[order[:place]].sum())
    # The last token that is kept may be another by float32's rounding, and with it the shares.
    tolerance = 1e-4 + p[p > 0].min()
    assert above - tolerance <= uniform <= above + p[choice.token] + tolerance


def test_temperature_zero_and_top_k_one_are_greedy_whatever_the_uniform_number() -> None:
    logits = torch.stack([logits_of(seed) for seed in range(30)])
    expected = logits.argmax(dim=-1).tolist()
    for params in (SamplingParams(temperature=0.0), SamplingParams(top_k=1, temperature=2.0)):
        choices = choose_tokens(logits, [params] * 30, [0.999] * 30)
        assert [choice.token for choice in choices] == expected


def test_of_equal_logits_greedy_takes_the_first() -> None:
    tied = torch.tensor([[0.0, 2.0, 2.0, 2.0, 1.0]])
    for params in (SamplingParams(temperature=0.0), SamplingParams(top_k=1)):
        assert choose_tokens(tied, [params], [0.9])[0].token == 1


def test_rows_have_their_own_parameters_and_do_not_touch_each_other() -> None:
    rows = [
        SamplingParams(),
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=3),
        SamplingParams(temperature=0.2),
        SamplingParams(top_p=0.4, temperature=2.0),
    ]
    logits = torch.stack([logits_of(seed) for seed in range(len(rows))])
    uniforms = [0.1, 0.2, 0.5, 0.7, 0.9]
    together = choose_tokens(logits, rows, uniforms)
    alone = [
        choose_tokens(logits[i : i + 1], [params], [uniforms[i]])[0]
        for i, params in enumerate(rows)
    ]
    assert together == alone


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3, 1e300])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = logits_of(3, spread=30.0)
    (choice,) = choose_tokens(logits[None], [SamplingParams(temperature=temperature)], [0.5])
    assert choice.is_finite
    assert math.isfinite(choice.logprob)
    if temperature < 1:
        assert choice.token == int(logits.argmax())
    else:
        assert choice.logprob == pytest.approx(-math.log(VOCAB))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_p=0.5)])
def test_a_row_with_a_bad_logit_is_told_apart(bad: float, params: SamplingParams) -> None:
    logits = torch.stack([logits_of(1), logits_of(2), logits_of(3)])
    logits[1, 7] = bad
    choices = choose_tokens(logits, [params] * 3, [0.3] * 3)
    assert [choice.is_finite for choice in choices] == [True, False, True]


def test_a_token_that_is_ruled_out_is_not_an_error() -> None:
    logits = logits_of(4)
    logits[5:] = -math.inf
    choices = choose_tokens(
        logits.expand(50, -1), [SamplingParams()] * 50, [i / 50 for i in range(50)]
    )
    assert {choice.token for choice in choices} <= set(range(5))
    assert all(choice.is_finite for choice in choices)


def test_uniform_numbers_depend_on_seed_and_sequence_only() -> None:
    def first(seed: int, number: int) -> list[float]:
        numbers = UniformNumbers(seed, number)
        return [numbers.next() for _ in range(3)]

    assert first(1, 2) == first(1, 2)
    streams = [first(seed, number) for seed in (0, 1, -1, 2**64, 2**64 + 1) for number in range(3)]
    flat = [value for stream in streams for value in stream]
    assert len(set(flat)) == len(flat)
    assert all(0 <= value < 1 for value in flat)


def test_uniform_numbers_are_pinned() -> None:
    """A replayed request must draw the same tokens, even after an upgrade of a library."""
    raw = np.random.Philox(np.random.SeedSequence((7, 0, 3))).random_raw(2)
    numbers = UniformNumbers(7, 3)
    assert [numbers.next(), numbers.next()] == [(int(value) >> 11) / 2**53 for value in raw]
    assert int(raw[0]) == 17748031444839476416  # numpy keeps bit generators the same for good
