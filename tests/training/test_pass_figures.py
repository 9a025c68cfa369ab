"""The figures of a policy-gradient pass equal sums written token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from django.contrib.auth.models import User

from futures.models import Future
from tests.conftest import InProcessWorker
from training.loss_fns import LOSS_FNS
from training.pass_figures import FIGURES, pass_figures, sampled_tokens
from training.services import forward_backward_submit
from training.types import Datum

RNG = np.random.default_rng(0)


def rollout(prompt: int, completion: int, advantage: float, **more: Any) -> Datum:
    """A datum as the cookbook makes it: zeros at the prompt."""
    length = prompt + completion - 1
    logprobs = np.zeros(length, np.float32)
    logprobs[prompt - 1 :] = -RNG.exponential(1.0, completion)
    advantages = np.zeros(length, np.float32)
    advantages[prompt - 1 :] = advantage
    return Datum(
        model_input=RNG.integers(0, 9, length).astype(np.int32),
        loss_fn_inputs={
            "target_tokens": RNG.integers(0, 9, length),
            "logprobs": logprobs,
            "advantages": advantages,
            **more,
        },
    )


def trained(data: list[Datum]) -> list[Any]:
    """Log-probabilities of a trainer that differs a little from the sampler."""
    return [
        (d.loss_fn_inputs["logprobs"] + RNG.normal(0, 0.3, len(d.model_input))).astype(np.float32)
        for d in data
    ]


def by_hand(
    data: list[Datum], logprobs: list[Any], low: float | None, high: float | None
) -> dict[str, float]:
    """The formulas of docs/curves.md, with loops and ``math``."""
    pairs, means = [], []
    for datum, ours in zip(data, logprobs, strict=True):
        inputs = datum.loss_fn_inputs
        own = []
        for index in range(len(datum.model_input)):
            advantage, theirs = float(inputs["advantages"][index]), float(inputs["logprobs"][index])
            if advantage != 0 or theirs != 0:
                own.append(advantage)
                pairs.append((theirs, float(ours[index])))
        if own:
            means.append((sum(own) / len(own), all(value == 0 for value in own), len(own)))
    n, m = len(pairs), len(means)
    mean = sum(value for value, _, _ in means) / m
    ratios = [math.exp(ours - theirs) for theirs, ours in pairs]
    figures = {
        "advantage_mean": mean,
        "advantage_std": math.sqrt(sum((value - mean) ** 2 for value, _, _ in means) / m),
        "advantage_zero_share": sum(is_zero for _, is_zero, _ in means) / m,
        "ratio_mean": sum(ratios) / n,
        "kl_k1": sum(theirs - ours for theirs, ours in pairs) / n,
        "kl_k3": sum(math.expm1(ours - theirs) - (ours - theirs) for theirs, ours in pairs) / n,
        "drift_mean": sum(abs(theirs - ours) for theirs, ours in pairs) / n,
        "drift_max": max(abs(theirs - ours) for theirs, ours in pairs),
        "entropy": -sum(theirs for theirs, _ in pairs) / n,
        "sampled_length": sum(length for _, _, length in means) / m,
        "sampled_tokens": n,
        "sequences": m,
    }
    if low is not None and high is not None:
        figures["clip_share"] = sum(not low <= ratio <= high for ratio in ratios) / n
    return figures


def a_batch() -> list[Datum]:
    return [rollout(5, 4, 1.5), rollout(3, 9, -0.5), rollout(7, 2, 0.0), rollout(1, 6, -1.0)]


@pytest.mark.parametrize(
    ("loss_fn", "config", "low", "high"),
    [
        ("importance_sampling", {}, None, None),
        ("ppo", {}, 0.8, 1.2),
        ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.05}, 0.9, 1.05),
        ("cispo", {}, 0.0, 4.0),
        ("gspo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}, None, None),
        ("custom", {}, None, None),
    ],
)
def test_each_figure_is_the_formula_of_the_manual(
    loss_fn: str, config: dict[str, float], low: float | None, high: float | None
) -> None:
    data = a_batch()
    logprobs = trained(data)
    figures = pass_figures(data, logprobs, loss_fn=loss_fn, loss_fn_config=config)
    assert figures == pytest.approx(by_hand(data, logprobs, low, high), rel=1e-5, abs=1e-7)
    assert figures.keys() <= FIGURES.keys()


def test_thresholds_for_each_token_replace_those_of_the_request() -> None:
    data = [rollout(2, 3, 1.0)]
    length = len(data[0].model_input)
    narrow = {
        "clip_low_threshold": np.full(length, 0.999, np.float32),
        "clip_high_threshold": np.full(length, 1.001, np.float32),
    }
    data = [
        Datum(model_input=data[0].model_input, loss_fn_inputs={**data[0].loss_fn_inputs, **narrow})
    ]
    logprobs = [data[0].loss_fn_inputs["logprobs"] + np.float32(0.1)]
    assert pass_figures(data, logprobs, loss_fn="ppo", loss_fn_config={})["clip_share"] == 1.0


def test_a_mask_says_which_tokens_were_sampled() -> None:
    datum = rollout(4, 3, 0.0, mask=np.array([0, 0, 1, 1, 1, 1], np.float32))
    assert sampled_tokens(datum).tolist() == [False, False, True, True, True, True]
    unmasked = rollout(4, 3, 0.0)
    assert sampled_tokens(unmasked).tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("loss_fn", [name for name, spec in LOSS_FNS.items()])
def test_a_pass_without_sampled_tokens_has_no_figures(loss_fn: str) -> None:
    length = 4
    zeros = {name: np.zeros(length, np.float32) for name in ("logprobs", "advantages")}
    datum = Datum(
        model_input=np.arange(length, dtype=np.int32),
        loss_fn_inputs={"target_tokens": np.arange(length), **zeros},
    )
    logprobs = [np.zeros(length, np.float32)]
    assert pass_figures([datum], logprobs, loss_fn=loss_fn, loss_fn_config={}) == {}


def test_cross_entropy_has_no_figures_of_a_policy() -> None:
    data = a_batch()
    assert pass_figures(data, trained(data), loss_fn="cross_entropy", loss_fn_config={}) == {}


def test_arrays_of_other_shapes_under_these_names_have_no_figures() -> None:
    datum = rollout(3, 3, 1.0)
    odd = {**datum.loss_fn_inputs, "advantages": np.ones((2, 2), np.float32)}
    data = [Datum(model_input=datum.model_input, loss_fn_inputs=odd)]
    assert pass_figures(data, trained([datum]), loss_fn="custom", loss_fn_config={}) == {}


def test_an_uploaded_loss_with_several_targets_has_no_figures() -> None:
    datum = rollout(3, 3, 1.0)
    several = [np.zeros((len(datum.model_input), 2), np.float32)]
    assert pass_figures([datum], several, loss_fn="custom", loss_fn_config={}) == {}


def test_a_huge_ratio_and_infinite_inputs_give_numbers_or_nulls_and_no_error() -> None:
    datum = rollout(2, 3, 1.0)
    far = [datum.loss_fn_inputs["logprobs"] + np.float32(5000)]
    assert math.isfinite(pass_figures([datum], far, loss_fn="ppo", loss_fn_config={})["ratio_mean"])
    never = [np.full(len(datum.model_input), -np.inf, np.float32)]
    assert pass_figures([datum], never, loss_fn="ppo", loss_fn_config={})["ratio_mean"] == 0


def test_the_worker_stores_the_figures_in_the_summary(
    work: InProcessWorker, django_user_model: type[User]
) -> None:
    owner = django_user_model.objects.create(username="ann")
    data = a_batch()
    future = forward_backward_submit(
        owner_id=owner.pk,
        model_id="policy",
        data=data,
        loss_fn="ppo",
        loss_fn_config={},
        train_on="auto",
        forward_only=False,
    ).future
    work()
    summary = Future.objects.get(pk=future.pk).summary
    hand = by_hand(data, [d.loss_fn_inputs["logprobs"] for d in data], None, None)
    for name in ("advantage_mean", "advantage_std", "advantage_zero_share", "entropy"):
        assert summary[name] == pytest.approx(hand[name], rel=1e-5)
    assert summary["loss_fn"] == "ppo"
    assert summary["sampled_tokens"] == 21
