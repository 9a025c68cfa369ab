"""The loss functions' formulas, each a pure function of target log-probabilities.

Every loss is a SUM over target tokens and datums; nothing is averaged or normalised, and the
client makes such choices in weights and advantages. Names, inputs and defaults are in
``training.loss_fns``. An elementwise loss may get any rows; the others (gspo) get
exactly one datum. Gradients come from autograd over these few numbers.

A ratio exp(lp - q) has no bound: a client may send any q. So each formula
also holds in the limit (an infinite ratio that is clipped has the clipped loss and no gradient, one
whose advantage is 0 has no effect), and values that leave float32's range are computed again
in float64. A value that is still infinite or NaN is truly outside float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LossInputs:
    """The inputs of one loss function: n rows of the stream, K targets each (K = 1 except for soft
    or top-K targets)."""

    target_logprobs: Tensor
    """(n, K) float32, the learner's log-probability of each target token, in nats."""
    inputs: Mapping[str, Tensor]
    """(n, K) float32 by name, all inputs of the loss: those of the datums, such as
    ``weights``, or the setting of that name if they have none."""
    config: Mapping[str, float]
    """Complete: defaults are filled in."""

    def double(self) -> LossInputs:
        """The same in float64, where no product of three float32 numbers overflows."""
        return LossInputs(
            target_logprobs=self.target_logprobs.double(),
            inputs={name: values.double() for name, values in self.inputs.items()},
            config=self.config,
        )


def loss_and_slope(loss_fn: str, x: LossInputs) -> tuple[Tensor, Tensor]:
    """Each target's loss (n, K), and its derivative in the target's log-probability (n, K).

    If either is not finite, the exact number is outside float32 or an input is not finite.
    """
    loss, slope = _differentiated(LOSSES[loss_fn], x)
    is_good = loss.isfinite() & slope.isfinite()
    # Only a CPU is asked: the host would wait for a GPU's answer longer than both take there.
    if loss.device.type != "cpu" or not bool(is_good.all()):
        exact = _differentiated(LOSSES[loss_fn], x.double())
        loss, slope = (
            torch.where(is_good, fast, slow.to(fast.dtype))
            for fast, slow in zip((loss, slope), exact, strict=True)
        )
    return loss, slope


def _differentiated(
    function: Callable[[LossInputs], Tensor], x: LossInputs
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = x.target_logprobs.detach().requires_grad_()
        loss = function(LossInputs(target_logprobs=leaf, inputs=x.inputs, config=x.config))
        (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), slope


def cross_entropy(x: LossInputs) -> Tensor:
    """-w * lp."""
    return -x.inputs["weights"] * x.target_logprobs


def importance_sampling(x: LossInputs) -> Tensor:
    """-r * A, with r = exp(lp - q): policy gradient corrected for the sampling policy q."""
    return -_ratio(x) * x.inputs["advantages"]


def ppo(x: LossInputs) -> Tensor:
    """-min(r * A, clamp(r, lo, hi) * A), with r = exp(lp - q); lo and hi bound the ratio."""
    ratio, advantages = _ratio(x), x.inputs["advantages"]
    return -(ratio * advantages).minimum(_clipped(ratio, x) * advantages)


def cispo(x: LossInputs) -> Tensor:
    """-stopgrad(clamp(r, lo, hi)) * lp * A, with r = exp(lp - q)."""
    return -_clipped(_ratio(x), x).detach() * x.target_logprobs * x.inputs["advantages"]


def dro(x: LossInputs) -> Tensor:
    """-(lp * A - beta / 2 * (lp - q)^2)."""
    lp = x.target_logprobs
    penalty = 0.5 * x.config["beta"] * (lp - x.inputs["logprobs"]).square()
    return penalty - lp * x.inputs["advantages"]


def gspo(x: LossInputs) -> Tensor:
    """-min(s * A, clamp(s, lo, hi) * A), with s = exp(L + lp - stopgrad(lp)) and
    L = mean over the masked tokens of (stopgrad(lp) - q): one ratio for the whole datum.

    The gradient of each token is that of its own lp. A datum without masked tokens has L = 0.
    """
    lp, advantages = x.target_logprobs, x.inputs["advantages"]
    is_counted = x.inputs["sequence_ratio_mask"] != 0
    gaps = (lp.detach() - x.inputs["logprobs"]).masked_fill(~is_counted, 0.0)
    mean_gap = gaps.sum() / is_counted.sum().clamp(min=1)
    # An overflowed sum could look like a small ratio; as NaN it is detected.
    mean_gap = mean_gap.where(mean_gap.isfinite(), math.nan)
    ratio = _exp(mean_gap + lp - lp.detach(), advantages)
    return -(ratio * advantages).minimum(_clipped(ratio, x) * advantages)


RATIO_BOUND = 2.0
"""The largest weight of a token in ``stable_reinforce``."""


def stable_reinforce(x: LossInputs) -> Tensor:
    """-c * (A * lp - kl / 2 * (lp - q)^2), with c = stopgrad(min(r, 2)), r = exp(lp - q) and kl
    the setting ``kl_coeff``; 0 where A = 0. Our own objective, not the hosted service's.

    The derivative is -c * (A - kl * (lp - q)): REINFORCE with a penalty for each nat by which
    the learner has left the sampling policy q.
    """
    lp, advantages = x.target_logprobs, x.inputs["advantages"]
    penalty = 0.5 * x.config["kl_coeff"] * (lp - x.inputs["logprobs"]).square()
    weight = _ratio(x).clamp(max=RATIO_BOUND).detach()
    return (weight * (penalty - lp * advantages)).masked_fill(advantages == 0, 0.0)


def _ratio(x: LossInputs) -> Tensor:
    return _exp(x.target_logprobs - x.inputs["logprobs"], x.inputs["advantages"])


def _exp(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """exp(log_ratio), which may be infinite; but 1 for a token without effect."""
    overflows = log_ratio > math.log(torch.finfo(log_ratio.dtype).max)
    exponents = log_ratio.masked_fill(overflows & (advantages == 0), 0.0)
    ratio: Tensor = _Exp.apply(exponents)  # type: ignore[no-untyped-call]  # in torch's stubs
    return ratio


class _Exp(torch.autograd.Function):
    """exp, in whose derivative zero times infinity is zero: a clipped ratio is constant."""

    @staticmethod
    def forward(ctx: Any, exponent: Tensor) -> Tensor:
        result = exponent.exp()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return torch.where(grad == 0, grad, grad * result)


def _clipped(ratio: Tensor, x: LossInputs) -> Tensor:
    return ratio.clamp(x.inputs["clip_low_threshold"], x.inputs["clip_high_threshold"])


LOSSES: Mapping[str, Callable[[LossInputs], Tensor]] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
    "gspo": gspo,
    "stable_reinforce": stable_reinforce,
}
"""One function for each name in ``training.loss_fns.LOSS_FNS``."""
