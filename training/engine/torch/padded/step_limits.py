"""Limits of a state space's step size, while it reads one token after another.

Mamba 2 and its relatives keep the size of a step within limits of their configuration. transformers
does so for a whole sequence, but not for a single token after a cache (nor do the CUDA kernels):
Nemotron-H, whose lower limit is not zero, then samples from other probabilities than those that a
pass over the same tokens gives. Here the single step gets the same limits: on the projection from
which the model computes it, before the bias and the softplus.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def limit_single_steps(model: nn.Module) -> None:
    """Apply the limits to single tokens in every mixer of the model that has some."""
    for module in model.modules():
        limits = getattr(module, "time_step_limit", None)
        projection = getattr(module, "in_proj", None)
        bias = getattr(module, "dt_bias", None)
        if not limits or not isinstance(projection, nn.Module) or bias is None:
            continue
        low, high = (_before_softplus(float(limit)) for limit in limits)
        if low > -math.inf or high < math.inf:
            projection.register_forward_hook(_Limits(bias, low, high))


class _Limits:
    """A forward hook of a projection whose last columns, one for each head, are the steps."""

    def __init__(self, bias: Tensor, low: float, high: float) -> None:
        self._bias = bias
        self._bounds = (low, high)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if torch.is_grad_enabled() or output.shape[1] != 1:
            return output
        low, high = (bound - self._bias for bound in self._bounds)
        num_heads = len(self._bias)
        limited = output[..., -num_heads:].clamp(low.to(output.dtype), high.to(output.dtype))
        return torch.cat([output[..., :-num_heads], limited], dim=-1)


def _before_softplus(step: float) -> float:
    """The number of which the softplus is ``step``."""
    if step <= 0 or step == math.inf:
        return math.inf if step > 0 else -math.inf
    return step + math.log(-math.expm1(-step))
