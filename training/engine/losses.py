"""The loss functions' formulas, each a pure function of target log-probabilities.

Every loss is a SUM over target tokens and datums; nothing is averaged or normalised, and the
client's weights and advantages are where such choices belong. Names, inputs and defaults are in
``training.loss_fns``. An elementwise loss may be given any rows; the others (gspo) are given
exactly one datum. Gradients come from autograd over these few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LossInputs:
    """What one loss function sees: n rows of the stream, K targets each (K = 1 but for soft
    or top-K targets)."""

    target_logprobs: Tensor
    """(n, K) float32, the learner's log-probability of each target token, in nats."""
    inputs: Mapping[str, Tensor]
    """(n, K) float32 by name, each that the loss may have: what the datums brought, such as
    ``weights``, and the setting of this name where they brought none."""
    config: Mapping[str, float]
    """Complete: defaults are filled in."""


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

    The gradient of each token is that of its own lp. A datum that masks no token has L = 0.
    """
    lp, advantages = x.target_logprobs, x.inputs["advantages"]
    is_counted = x.inputs["sequence_ratio_mask"] != 0
    gaps = (lp.detach() - x.inputs["logprobs"]).masked_fill(~is_counted, 0.0)
    mean_gap = gaps.sum() / is_counted.sum().clamp(min=1)
    ratio = (mean_gap + lp - lp.detach()).exp()
    return -(ratio * advantages).minimum(_clipped(ratio, x) * advantages)


def _ratio(x: LossInputs) -> Tensor:
    return (x.target_logprobs - x.inputs["logprobs"]).exp()


def _clipped(ratio: Tensor, x: LossInputs) -> Tensor:
    return ratio.clamp(x.inputs["clip_low_threshold"], x.inputs["clip_high_threshold"])


LOSSES: Mapping[str, Callable[[LossInputs], Tensor]] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "dro": dro,
    "gspo": gspo,
}
"""One function for each name in ``training.loss_fns.LOSS_FNS``."""
