"""The loss functions' names, inputs and settings, for those who may not import torch.

The formulas are in ``training.engine.losses``, whose table has one function per name here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class LossFnSpec:
    """What one loss function takes."""

    inputs: tuple[str, ...]
    """Names in ``loss_fn_inputs``; all are required, no other is allowed."""
    config: Mapping[str, float | None] = field(default_factory=dict)
    """Names in ``loss_fn_config`` and their defaults; None means that it must be given."""


_POLICY_INPUTS = ("target_tokens", "logprobs", "advantages")

LOSS_FNS: Mapping[str, LossFnSpec] = {
    "cross_entropy": LossFnSpec(inputs=("target_tokens", "weights")),
    "importance_sampling": LossFnSpec(inputs=_POLICY_INPUTS),
    "ppo": LossFnSpec(
        inputs=_POLICY_INPUTS, config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    ),
    "cispo": LossFnSpec(
        inputs=_POLICY_INPUTS, config={"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}
    ),
    "dro": LossFnSpec(inputs=_POLICY_INPUTS, config={"beta": None}),
}
