"""One next token per row of logits: temperature, top-k, top-p, min-p, and its log-probability.

Every row's token is chosen by inverting its cumulative distribution at one uniform number that the
caller passes, so a row's token depends only on its logits, its parameters and that number.

The log-probability is that of the whole tempered distribution; top-k, top-p and min-p
do not affect it. A learner computes the log-probability of a token over all tokens, and the
ratio of the two is what policy gradients need; renormalised over the cut set, the number could not
be compared with anything the learner can compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from training.engine.torch.to_device import to_device
from training.errors import InvalidRequest
from training.types import SamplingParams

NUCLEUS_CANDIDATES = 1024
"""Number of likeliest tokens tried first for top-p; sorting all takes far longer."""

BLOCK_TOKENS = 256
"""Tokens summed at once in the search for the drawn one."""


@dataclass(frozen=True)
class Choice:
    """The result for one row."""

    token: int
    logprob: float
    """In nats, of the tempered distribution; untempered for temperature 0."""
    is_finite: bool
    """False if the logits have NaN or infinity; then token and log-probability are meaningless."""
    top: tuple[list[int], list[float]]
    """The likeliest tokens and their log-probabilities, as many as requested."""


class UniformNumbers:
    """The random numbers of one sequence, a function of (seed, sequence number, count so far).

    A separate counter-based generator, whose raw output is stable across numpy versions; no
    global random state is read or changed.
    """

    def __init__(self, seed: int, sequence_number: int) -> None:
        entropy = (abs(seed), int(seed < 0), sequence_number)
        self._generator = np.random.Philox(np.random.SeedSequence(entropy))

    def next(self) -> float:
        """A multiple of 2**-53 in [0, 1)."""
        return float(int(self._generator.random_raw()) >> 11) * 2.0**-53


def check_choice_params(params: SamplingParams) -> None:
    """Refuse parameters that define no distribution.

    Raises:
        InvalidRequest: The message names the parameter.
    """
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise InvalidRequest(
            f"temperature: {params.temperature} is not a finite number of at least 0"
        )
    if not (params.top_k == -1 or params.top_k >= 1):
        raise InvalidRequest(f"top_k: {params.top_k} is neither -1 (no limit) nor at least 1")
    if not 0 < params.top_p <= 1:
        raise InvalidRequest(f"top_p: {params.top_p} is not above 0 and at most 1")
    if not 0 <= params.min_p <= 1:
        raise InvalidRequest(f"min_p: {params.min_p} is not from 0 to 1")


def draw_tokens(logits: Tensor, temperature: float, uniforms: Sequence[Sequence[float]]) -> Tensor:
    """Tokens (n, k) drawn with replacement, k from each row.

    Args:
        logits: (n, V) float32.
        temperature: 0 gives the likeliest token each time.
        uniforms: (n, k) in [0, 1).
    """
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True).expand(-1, len(uniforms[0]))
    smallest = torch.finfo(torch.float32).tiny
    tempered = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, smallest)
    logprobs = tempered.log_softmax(dim=-1)  # (n, V)
    numbers = to_device(uniforms, logits.device, torch.float64)  # (n, k)
    return torch.stack([_invert(logprobs, column) for column in numbers.unbind(1)], dim=1)


def choose_tokens(
    logits: Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
    num_top: Sequence[int] = (),
    changed: Mapping[int, Tensor] = MappingProxyType({}),
) -> list[Choice]:
    """Choose the next token of n sequences.

    Args:
        logits: (n, V) float32.
        params: The parameters of each row.
        uniforms: A number in [0, 1) for each row; greedy rows ignore it.
        num_top: The number of likeliest tokens to return for each row; empty for none.
        changed: For some rows, by number, the logits (V,) to choose from instead; the returned
            log-probabilities are still those of ``logits``.
    """
    device = logits.device
    temperatures = to_device([p.temperature or 1.0 for p in params], device, torch.float32)
    temperatures.clamp_(min=torch.finfo(torch.float32).tiny)
    largest, likeliest = logits.max(dim=-1)  # (n,)
    # The largest logit becomes 0 first, so that a small temperature does not cause infinity.
    tempered = (logits - largest[:, None]) / temperatures[:, None]
    logprobs = tempered.log_softmax(dim=-1)  # (n, V)
    chosen = likeliest.clone()  # (n,)
    whole = [
        i for i, p in enumerate(params) if not _is_greedy(p) and not _is_cut(p) and i not in changed
    ]
    if whole:
        rows = to_device(whole, device)
        drawn = to_device([uniforms[i] for i in whole], device, torch.float64)
        chosen[rows] = _invert(logprobs if len(whole) == len(params) else logprobs[rows], drawn)
    for i, p in enumerate(params):
        if i in changed:
            chosen[i] = _choose_changed(changed[i], temperatures[i], p, uniforms[i])
        elif not _is_greedy(p) and _is_cut(p):
            chosen[i] = _choose_from_cut(logprobs[i], p, uniforms[i])
    chosen_logprobs = logprobs.gather(1, chosen[:, None])[:, 0]  # (n,)
    tops = [_top(row, k) for row, k in zip(logprobs, num_top or [0] * len(params), strict=True)]
    return [
        Choice(token, logprob, is_finite, top)
        for token, logprob, is_finite, top in zip(
            chosen.tolist(),
            chosen_logprobs.tolist(),
            # A NaN or +inf anywhere in a row makes all its log-probabilities NaN.
            logprobs.amax(dim=-1).isfinite().tolist(),
            tops,
            strict=True,
        )
    ]


def _choose_changed(
    logits: Tensor, temperature: Tensor, params: SamplingParams, uniform: float
) -> Tensor:
    """A token (scalar) from one row of logits (V,)."""
    largest, likeliest = logits.max(dim=-1)
    if _is_greedy(params):
        return likeliest
    logprobs = ((logits - largest) / temperature).log_softmax(dim=-1)
    if _is_cut(params):
        return _choose_from_cut(logprobs, params, uniform)
    drawn = to_device([uniform], logits.device, torch.float64)
    return _invert(logprobs[None], drawn)[0]


def _top(logprobs: Tensor, k: int) -> tuple[list[int], list[float]]:
    """The k likeliest of a row (V,), or all of them if it has fewer."""
    if not k:
        return [], []
    values, tokens = logprobs.topk(min(k, len(logprobs)))
    return tokens.tolist(), values.tolist()


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature == 0 or params.top_k == 1


def _is_cut(params: SamplingParams) -> bool:
    return params.top_k != -1 or params.top_p < 1 or params.min_p > 0


def _invert(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens (n,) at which the cumulative probability passes ``uniforms`` (n,) of its total.

    Found in two steps, the block of tokens and then the token in it, since summing a whole
    vocabulary one by one takes longer than the model's output head.
    """
    num_rows, vocab_size = logprobs.shape
    blocks = pad(logprobs.exp(), (0, -vocab_size % BLOCK_TOKENS)).view(num_rows, -1, BLOCK_TOKENS)
    # (n, V / block): each block's share, and the sum of it and those before.
    shares = blocks.sum(dim=-1, dtype=torch.float64)
    cumulative = shares.cumsum(dim=-1)
    # NaN would break the search; such a row's token is discarded, but must exist.
    targets = (uniforms * cumulative[:, -1]).nan_to_num_(0.0)[:, None]  # (n, 1)
    block = _search(cumulative, targets)  # (n, 1)
    before = cumulative.gather(1, block) - shares.gather(1, block)
    chosen_blocks = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK_TOKENS))[:, 0]
    place = _search(chosen_blocks.cumsum(dim=-1, dtype=torch.float64), targets - before)
    return (block * BLOCK_TOKENS + place)[:, 0].clamp_(max=vocab_size - 1)


def _search(cumulative: Tensor, targets: Tensor) -> Tensor:
    """The first place (n, 1) of each row that is above its target."""
    return torch.searchsorted(cumulative, targets, right=True).clamp_(max=cumulative.shape[1] - 1)


def _choose_from_cut(logprobs: Tensor, params: SamplingParams, uniform: float) -> Tensor:
    """A token (scalar) of the ``top_k`` likeliest, of those of the smallest set whose share of
    their probability reaches ``top_p``, and of those the ones that are at least ``min_p`` times as
    likely as the likeliest, which is always among them."""
    vocab_size = len(logprobs)
    limit = vocab_size if params.top_k == -1 else min(params.top_k, vocab_size)
    looked_at = limit
    if params.top_k == -1 and logprobs.device.type == "cpu":
        looked_at = min(NUCLEUS_CANDIDATES, limit)
    while True:
        best, tokens = logprobs.topk(looked_at)
        floor = best[:1] + (math.log(params.min_p) if params.min_p else -math.inf)
        cumulative = best.double().exp().cumsum(dim=0)
        if looked_at == limit or cumulative[-1] >= params.top_p or best[-1] < floor:
            break
        looked_at = min(limit, looked_at * 8)
    mass = cumulative[-1:] if looked_at == limit else 1.0
    before = torch.cat([cumulative.new_zeros(1), cumulative[:-1]])
    is_kept = (before < params.top_p * mass) & (best >= floor)
    last = is_kept.sum(dim=0, keepdim=True).sub_(1).clamp_(min=0)  # (1,), of the kept
    target = uniform * cumulative.index_select(0, last)
    place = torch.searchsorted(cumulative, target, right=True).minimum(last)
    return tokens.index_select(0, place)[0]
