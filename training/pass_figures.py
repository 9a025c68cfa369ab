"""The figures of a policy-gradient pass: ratios, advantages, KL, lengths.

The worker computes them once, when the request finishes, and stores them in the future's summary.
This module is the only place that defines them; ``tinkerapi/docs/curves.md`` has the formulas.

A token counts as **sampled** if ``mask`` says so, where the client sent it; otherwise if its
advantage or its sampling log-probability is not 0, because client libraries send 0 for both at
the tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.loss_fns import ADVANTAGES, LOGPROBS, LOSS_FNS, MASK, THRESHOLDS, takes_advantages
from training.types import Datum

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

MAX_EXPONENT = 700.0
"""exp(710) overflows."""

FIGURES: Mapping[str, str] = {
    "advantage_mean": "Mean advantage of the sequences",
    "advantage_std": "Their standard deviation",
    "advantage_zero_share": "Share of sequences whose advantage is 0: they teach nothing",
    "ratio_mean": "Mean of the trainer's probability by the sampler's, over sampled tokens",
    "clip_share": "Share of sampled tokens whose ratio is outside the loss's thresholds",
    "kl_k1": "KL of the sampler to the trainer: mean of log(sampler / trainer)",
    "kl_k3": "The same KL, estimated with less variance: mean of ratio - 1 - log(ratio)",
    "drift_mean": "Mean absolute difference of the sampler's and the trainer's log-probabilities",
    "drift_max": "The largest such difference of any sampled token",
    "entropy": "Entropy of the sampler for each token: mean of -log(sampler)",
    "sampled_length": "Mean number of sampled tokens in a sequence",
    "sampled_tokens": "Number of sampled tokens",
    "sequences": "Number of datums with sampled tokens",
}
"""Name in the summary to what it is."""


def sampled_tokens(datum: Datum) -> Flags:
    """(N,) whether each target was sampled by the policy; see the module's docstring."""
    inputs = datum.loss_fn_inputs
    if MASK in inputs:
        flags: Flags = np.asarray(inputs[MASK]) > 0
        return flags
    either: Flags = (np.asarray(inputs[ADVANTAGES]) != 0) | (np.asarray(inputs[LOGPROBS]) != 0)
    return either


def is_policy_data(data: Sequence[Datum], loss_fn: str) -> bool:
    """Whether the loss takes advantages, and all datums have one of them and one sampling
    log-probability for each target. An uploaded loss may give these names to other shapes."""
    if not data or not takes_advantages(loss_fn):
        return False
    return all(_has_rows(datum, (ADVANTAGES, LOGPROBS)) for datum in data)


def _has_rows(datum: Datum, names: Sequence[str]) -> bool:
    inputs, shape = datum.loss_fn_inputs, (len(datum.model_input),)
    if shape == (0,):
        return False
    has_names = all(name in inputs and np.shape(inputs[name]) == shape for name in names)
    return has_names and np.shape(inputs.get(MASK, np.empty(shape))) == shape


def pass_figures(
    data: Sequence[Datum],
    logprobs: Sequence[NDArray[np.float32]],
    *,
    loss_fn: str,
    loss_fn_config: Mapping[str, float],
) -> dict[str, float]:
    """The figures of ``FIGURES`` that this pass has; none if no token of it was sampled.

    Args:
        logprobs: The trainer's, of each datum's targets; the shape of ``advantages``.
    """
    if not is_policy_data(data, loss_fn) or any(
        np.shape(values) != (len(datum.model_input),)  # several targets, with an uploaded loss
        for datum, values in zip(data, logprobs, strict=True)
    ):
        return {}
    with np.errstate(all="ignore"):  # a client's infinite input gives a null, not a warning
        return _figures(data, logprobs, loss_fn, loss_fn_config)


def _figures(
    data: Sequence[Datum],
    logprobs: Sequence[NDArray[np.float32]],
    loss_fn: str,
    loss_fn_config: Mapping[str, float],
) -> dict[str, float]:
    lengths = np.array([len(datum.model_input) for datum in data])
    is_sampled = np.concatenate([sampled_tokens(datum) for datum in data])
    if not is_sampled.any():
        return {}
    counts = _sums(is_sampled, lengths)
    sampler = _joined(data, LOGPROBS)[is_sampled]
    trainer = np.concatenate(logprobs).astype(np.float64)[is_sampled]
    advantages = np.where(is_sampled, _joined(data, ADVANTAGES), 0.0)
    means = _sums(advantages, lengths)[counts > 0] / counts[counts > 0]
    is_zero = _sums(advantages != 0, lengths)[counts > 0] == 0
    log_ratio = trainer - sampler
    ratio = np.exp(np.minimum(log_ratio, MAX_EXPONENT))
    figures: dict[str, Any] = {
        "advantage_mean": means.mean(),
        "advantage_std": means.std(),
        "advantage_zero_share": is_zero.mean(),
        "ratio_mean": ratio.mean(),
        "kl_k1": -log_ratio.mean(),
        "kl_k3": (ratio - 1 - log_ratio).mean(),
        "drift_mean": np.abs(log_ratio).mean(),
        "drift_max": np.abs(log_ratio).max(),
        "entropy": -sampler.mean(),
        "sampled_length": counts[counts > 0].mean(),
    }
    is_clipped = _clipped(data, is_sampled, ratio, loss_fn, loss_fn_config)
    if is_clipped is not None:
        figures["clip_share"] = is_clipped.mean()
    exact = {name: float(f"{value:.7g}") for name, value in figures.items()}
    return exact | {"sampled_tokens": len(ratio), "sequences": len(means)}


def _clipped(
    data: Sequence[Datum],
    is_sampled: Flags,
    ratio: Floats,
    loss_fn: str,
    loss_fn_config: Mapping[str, float],
) -> Flags | None:
    """Whether each sampled token's ratio is outside the thresholds; None if the loss has none for
    tokens."""
    spec = LOSS_FNS.get(loss_fn)
    if spec is None or not spec.has_thresholds or not spec.is_elementwise:
        return None
    low, high = (
        _of_tokens(data, name, loss_fn_config.get(name, spec.config[name].default))[is_sampled]
        for name in THRESHOLDS
    )
    clipped: Flags = (ratio < low) | (ratio > high)
    return clipped


def _of_tokens(data: Sequence[Datum], name: str, default: float | None) -> Floats:
    """A setting at each token of all datums, where a datum may have its own."""
    parts = [datum.loss_fn_inputs.get(name, np.asarray(default)) for datum in data]
    lengths = [len(datum.model_input) for datum in data]
    return np.concatenate(
        [np.broadcast_to(part, length) for part, length in zip(parts, lengths, strict=True)]
    ).astype(np.float64)


def _joined(data: Sequence[Datum], name: str) -> Floats:
    """One input of all datums, end to end."""
    return np.concatenate([datum.loss_fn_inputs[name] for datum in data]).astype(np.float64)


def _sums(values: NDArray[Any], lengths: NDArray[np.int64]) -> Floats:
    """The sum of each datum's part of ``values``; a datum has at least one token."""
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    sums: Floats = np.add.reduceat(values.astype(np.float64), starts)
    return sums
