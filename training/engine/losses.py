"""The loss functions: one table, each a pure elementwise function of target log-probabilities.

Every loss is a SUM over target tokens and datums; nothing is averaged or normalised, and the
client's weights and advantages are where such choices belong. Elementwise means that a batch
may be cut anywhere between two rows. Gradients come from autograd over these few numbers.

Only tensor methods are used, so that this module imports no torch and whatever answers "which
losses are there" need not either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from training.errors import InvalidRequest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LossInputs:
    """What one loss function sees: n rows of the stream, K targets each (K = 1 but for soft
    or top-K targets)."""

    target_logprobs: Tensor
    """(n, K) float32, the learner's log-probability of each target token, in nats."""
    inputs: Mapping[str, Tensor]
    """(n, K) float32 by name: what the datums brought, such as ``weights``."""
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


def _ratio(x: LossInputs) -> Tensor:
    return (x.target_logprobs - x.inputs["logprobs"]).exp()


def _clipped(ratio: Tensor, x: LossInputs) -> Tensor:
    return ratio.clamp(x.config["clip_low_threshold"], x.config["clip_high_threshold"])


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss function and what a request must bring for it."""

    function: Callable[[LossInputs], Tensor]
    inputs: tuple[str, ...]
    """Float inputs that each datum must have beside ``target_tokens``."""
    config: Mapping[str, float | None] = field(default_factory=dict)
    """Every config key with its default; None means that the request must say it."""
    allows_many_targets: bool = False
    """Whether ``target_tokens`` may be (N, K)."""

    @property
    def formula(self) -> str:
        return (self.function.__doc__ or "").strip()


_POLICY_INPUTS = ("logprobs", "advantages")

LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(function=cross_entropy, inputs=("weights",), allows_many_targets=True),
    "importance_sampling": Loss(function=importance_sampling, inputs=_POLICY_INPUTS),
    "ppo": Loss(
        function=ppo,
        inputs=_POLICY_INPUTS,
        config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    ),
    "cispo": Loss(
        function=cispo,
        inputs=_POLICY_INPUTS,
        config={"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    ),
    "dro": Loss(function=dro, inputs=_POLICY_INPUTS, config={"beta": None}),
}


def find_loss(loss_fn: str) -> Loss:
    """The loss of this name.

    Raises:
        InvalidRequest: There is none; the message lists those there are.
    """
    if loss_fn not in LOSSES:
        raise InvalidRequest(f"loss_fn: unknown name {loss_fn!r}; known: {', '.join(LOSSES)}")
    return LOSSES[loss_fn]
