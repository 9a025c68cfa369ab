"""Loss functions against their formulas written a second time in numpy, and their identities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.engine.torch.losses import LOSSES, LossInputs
from training.loss_fns import LOSS_FNS

N = 200
CONFIG = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2, "beta": 0.05, "kl_coeff": 0.1}


def draw():
    rng = np.random.default_rng(0)
    return {
        "lp": rng.normal(size=N) * 2 - 4,
        "logprobs": rng.normal(size=N) * 2 - 4,
        "advantages": rng.normal(size=N),
        "weights": rng.normal(size=N),
        "sequence_ratio_mask": (rng.random(N) < 0.6).astype(float),
    }


def evaluate(loss_fn, values, **config):
    """Loss per token and its gradient in the log-probabilities, float64."""
    lp = torch.tensor(values["lp"], requires_grad=True)
    inputs = {
        name: torch.tensor(values.get(name, np.full(len(lp), config.get(name))))
        for name in LOSS_FNS[loss_fn].float_inputs
    }
    loss = LOSSES[loss_fn](LossInputs(target_logprobs=lp, inputs=inputs, config=config))
    (grad,) = torch.autograd.grad(loss.sum(), lp)
    return loss.detach().numpy(), grad.numpy()


def closed_forms(v, clip_low_threshold=0.8, clip_high_threshold=1.2, beta=0.05, kl_coeff=0.1):
    """Loss and gradient of every loss, as formulas, by name."""
    lp, q, a, w, mask = (v[n] for n in ("lp", "logprobs", "advantages", "weights", MASK))
    lo, hi = v.get("clip_low_threshold", clip_low_threshold), clip_high_threshold
    r = np.exp(lp - q)
    clipped = np.clip(r, lo, hi)
    is_unclipped_smaller = r * a <= clipped * a
    s = np.exp((lp - q)[mask != 0].mean())  # one number
    s_clipped = np.clip(s, lo, hi)
    is_s_smaller = s * a <= s_clipped * a
    return {
        "cross_entropy": (-w * lp, -w),
        "importance_sampling": (-r * a, -r * a),
        "ppo": (-np.minimum(r * a, clipped * a), np.where(is_unclipped_smaller, -r * a, 0)),
        "cispo": (-clipped * lp * a, -clipped * a),
        "dro": (-(lp * a - 0.5 * beta * (lp - q) ** 2), -(a - beta * (lp - q))),
        "stable_reinforce": (
            -np.minimum(r, 2) * (a * lp - kl_coeff / 2 * (lp - q) ** 2),
            -np.minimum(r, 2) * (a - kl_coeff * (lp - q)),
        ),
        "gspo": (-np.minimum(s * a, s_clipped * a), np.where(is_s_smaller, -s * a, 0)),
    }


MASK = "sequence_ratio_mask"


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_a_loss_and_its_gradient_are_the_closed_form(loss_fn):
    values = draw()
    loss, grad = evaluate(loss_fn, values, **CONFIG)
    expected_loss, expected_grad = closed_forms(values)[loss_fn]
    np.testing.assert_allclose(loss, expected_loss)
    np.testing.assert_allclose(grad, expected_grad)


@pytest.mark.parametrize("loss_fn", ["ppo", "cispo", "gspo"])
def test_thresholds_per_token_replace_the_setting(loss_fn):
    values = draw()
    values["logprobs"] += 1.0  # so that the sequence's ratio is low, too
    unchanged, _ = closed_forms(values)[loss_fn]
    values["clip_low_threshold"] = np.random.default_rng(1).uniform(0.1, 1.1, N)
    loss, grad = evaluate(loss_fn, values, **CONFIG)
    expected_loss, expected_grad = closed_forms(values)[loss_fn]
    np.testing.assert_allclose(loss, expected_loss)
    np.testing.assert_allclose(grad, expected_grad)
    assert not np.allclose(loss, unchanged)


def test_every_loss_of_the_table_has_a_formula_and_a_closed_form_here():
    assert set(closed_forms(draw())) == set(LOSSES) == set(LOSS_FNS)


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


@pytest.mark.parametrize("thresholds", [(0.0, 1e9), (0.8, 1.2)])
def test_gspo_of_one_token_is_ppo(thresholds):
    values = {name: array[:1] for name, array in draw().items()} | {MASK: np.ones(1)}
    config = dict(zip(("clip_low_threshold", "clip_high_threshold"), thresholds, strict=True))
    for ours, theirs in zip(
        evaluate("gspo", values, **config), evaluate("ppo", values, **config), strict=True
    ):
        np.testing.assert_allclose(ours, theirs)


def test_gspo_without_masked_tokens_has_a_ratio_of_one():
    values = draw() | {MASK: np.zeros(N)}
    loss, grad = evaluate("gspo", values, **CONFIG)
    np.testing.assert_allclose(loss, -values["advantages"])
    np.testing.assert_allclose(grad, -values["advantages"])


def test_dro_without_a_penalty_is_advantage_weighted_cross_entropy():
    values = draw()
    values["weights"] = values["advantages"]
    for ours, theirs in zip(
        evaluate("dro", values, beta=0.0), evaluate("cross_entropy", values), strict=True
    ):
        np.testing.assert_allclose(ours, theirs)


def test_on_policy_stable_reinforce_is_reinforce():
    """If nothing has moved, the ratio's bound and the penalty have no effect."""
    values = draw()
    values["logprobs"] = values["lp"]
    _, grad = evaluate("stable_reinforce", values, kl_coeff=0.1)
    np.testing.assert_allclose(grad, -values["advantages"])


def test_the_penalty_of_stable_reinforce_is_the_gradient_of_the_kl_divergence():
    """In expectation over samples of the policy q, while no ratio is bounded, in float64."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    q = (logits.detach() + 0.3 * torch.randn(6, generator=generator)).log_softmax(-1)
    lp = logits.log_softmax(-1)
    assert (lp - q).exp().max() < 2
    kl = (lp.exp() * (lp - q)).sum()  # of the learner from the sampling policy
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    tiny = torch.full_like(q, 1e-12)  # an advantage of 0 would leave the tokens out
    inputs = {"logprobs": q, "advantages": tiny}
    leaf = lp.detach().requires_grad_()
    loss = LOSSES["stable_reinforce"](
        LossInputs(target_logprobs=leaf, inputs=inputs, config={"kl_coeff": 1.0})
    )
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    (ours,) = torch.autograd.grad((q.exp() * slope * lp).sum(), logits)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


def test_ppo_stops_pushing_a_ratio_that_left_the_thresholds_the_good_way():
    values = {
        "lp": np.log([2.0, 0.5, 2.0, 0.5]),
        "logprobs": np.zeros(4),
        "advantages": np.array([1.0, -1.0, -1.0, 1.0]),
    }
    _, grad = evaluate("ppo", values, clip_low_threshold=0.8, clip_high_threshold=1.2)
    np.testing.assert_allclose(grad, [0, 0, 2.0, -0.5])
