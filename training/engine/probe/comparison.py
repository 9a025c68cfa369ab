"""The comparison of the check at the start: which differences rounding explains."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Largest difference that rounding explains: of log-probabilities in nats, in float32 of any token
at any position, otherwise the mean over a passage; of a gradient, relative to it. The default
model differs by 1e-5 in float32 and 0.2 in bfloat16, where single numbers are much noisier than
their mean."""


def tolerance(dtype: torch.dtype) -> float:
    """The largest difference of results that a model computes in this dtype."""
    return TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])


def logprob_difference(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> float:
    """How far two passages' log-probabilities (n, V) are apart, in nats; NaN if one is NaN.

    Compare it by ``not difference <= tolerance(dtype)``, which NaN fails too.
    """
    difference = (ours - theirs).abs()
    return float(difference.max() if dtype == torch.float32 else difference.mean())


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference by the norm of ``theirs``; not divided if that is zero."""
    size, difference = float(theirs.norm()), float((ours - theirs).norm())
    return difference / size if size else difference
