"""Loss functions against their formulas written a second time in numpy, and their identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.engine.losses import LOSSES, LossInputs, find_loss
from training.errors import InvalidRequest

N = 200


def draw():
    rng = np.random.default_rng(0)
    return {
        "lp": rng.normal(size=N) * 2 - 4,
        "logprobs": rng.normal(size=N) * 2 - 4,
        "advantages": rng.normal(size=N),
        "weights": rng.normal(size=N),
    }


def evaluate(loss_fn, values, **config):
    """Loss per token and its gradient in the log-probabilities, float64."""
    lp = torch.tensor(values["lp"], requires_grad=True)
    inputs = {name: torch.tensor(values[name]) for name in LOSSES[loss_fn].inputs}
    loss = LOSSES[loss_fn].function(LossInputs(target_logprobs=lp, inputs=inputs, config=config))
    (grad,) = torch.autograd.grad(loss.sum(), lp)
    return loss.detach().numpy(), grad.numpy()


def closed_forms(v, lo=0.8, hi=1.2, beta=0.05):
    """Loss and gradient of every loss, as formulas, by name."""
    lp, q, a, w = v["lp"], v["logprobs"], v["advantages"], v["weights"]
    r = np.exp(lp - q)
    clipped = np.clip(r, lo, hi)
    is_unclipped_smaller = r * a <= clipped * a
    return {
        "cross_entropy": (-w * lp, -w),
        "importance_sampling": (-r * a, -r * a),
        "ppo": (-np.minimum(r * a, clipped * a), np.where(is_unclipped_smaller, -r * a, 0)),
        "cispo": (-clipped * lp * a, -clipped * a),
        "dro": (-(lp * a - 0.5 * beta * (lp - q) ** 2), -(a - beta * (lp - q))),
    }


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_a_loss_and_its_gradient_are_the_closed_form(loss_fn):
    values = draw()
    config = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2, "beta": 0.05}
    loss, grad = evaluate(loss_fn, values, **config)
    expected_loss, expected_grad = closed_forms(values)[loss_fn]
    np.testing.assert_allclose(loss, expected_loss)
    np.testing.assert_allclose(grad, expected_grad)


def test_every_loss_has_a_closed_form_here():
    assert set(closed_forms(draw())) == set(LOSSES)


def test_importance_sampling_with_equal_logprobs_is_the_policy_gradient():
    values = draw()
    values["logprobs"] = values["lp"]
    _, grad = evaluate("importance_sampling", values)
    np.testing.assert_allclose(grad, -values["advantages"])


@pytest.mark.parametrize("loss_fn", ["ppo", "cispo"])
def test_wide_thresholds_give_importance_samplings_gradient(loss_fn):
    values = draw()
    _, grad = evaluate(loss_fn, values, clip_low_threshold=0.0, clip_high_threshold=1e9)
    _, expected = evaluate("importance_sampling", values)
    np.testing.assert_allclose(grad, expected)


def test_dro_without_a_penalty_is_advantage_weighted_cross_entropy():
    values = draw()
    values["weights"] = values["advantages"]
    for ours, theirs in zip(
        evaluate("dro", values, beta=0.0), evaluate("cross_entropy", values), strict=True
    ):
        np.testing.assert_allclose(ours, theirs)


def test_ppo_stops_pushing_a_ratio_that_left_the_thresholds_the_good_way():
    values = {
        "lp": np.log([2.0, 0.5, 2.0, 0.5]),
        "logprobs": np.zeros(4),
        "advantages": np.array([1.0, -1.0, -1.0, 1.0]),
    }
    _, grad = evaluate("ppo", values, clip_low_threshold=0.8, clip_high_threshold=1.2)
    np.testing.assert_allclose(grad, [0, 0, 2.0, -0.5])


def test_an_unknown_loss_is_refused_with_the_known_names():
    with pytest.raises(InvalidRequest, match=r"loss_fn: unknown name 'mse'; known: cross_entropy"):
        find_loss("mse")
