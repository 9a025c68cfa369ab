"""A request's changes to the logits from which its tokens are drawn: biases and penalties.

They only affect which token is drawn: the log-probabilities in an answer stay those
of the model, as a learner computes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from training.engine.torch.to_device import to_device
from training.errors import InvalidRequest
from training.types import SamplingParams, TokenIds


def changes_logits(params: SamplingParams) -> bool:
    """Whether ``changed_logits`` would change the logits."""
    return bool(
        params.logit_bias
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1
    )


def changed_logits(
    logits: Tensor, params: SamplingParams, prompt: TokenIds, sampled: Sequence[int]
) -> Tensor:
    """A copy of one row of logits (V,), biased and penalized in vLLM's order.

    1. ``logit_bias``: logit + bias.
    2. ``repetition_penalty`` r, for tokens in the prompt or sampled: logit / r above 0, else
       logit * r.
    3. ``frequency_penalty`` f and ``presence_penalty`` p, for tokens sampled c times:
       logit - f * c - p.
    """
    logits, device = logits.clone(), logits.device
    if params.logit_bias:
        tokens, biases = zip(*params.logit_bias, strict=True)
        logits[to_device(tokens, device)] += to_device(biases, device, logits.dtype)
    if params.repetition_penalty != 1:
        seen = to_device(np.union1d(prompt, np.asarray(sampled, np.int64)), device)
        penalty, values = params.repetition_penalty, logits[seen]
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sampled and (params.frequency_penalty or params.presence_penalty):
        said, counts = (to_device(each, device) for each in np.unique(sampled, return_counts=True))
        logits[said] -= params.frequency_penalty * counts + params.presence_penalty
    return logits


def check_logit_changes(params: SamplingParams, vocab_size: int) -> None:
    """Refuse numbers that would make logits infinite, and tokens that do not exist.

    Raises:
        InvalidRequest: The message names the parameter.
    """
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(params, name)
        if not -2 <= value <= 2:
            raise InvalidRequest(f"{name}: {value} is not from -2 to 2")
    if not 0.01 <= params.repetition_penalty <= 100:
        raise InvalidRequest(
            f"repetition_penalty: {params.repetition_penalty} is not from 0.01 to 100"
        )
    for token, bias in params.logit_bias:
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"logit_bias.{token}: token {token} is not in the vocabulary of {vocab_size}"
            )
        if not (math.isfinite(bias) and -100 <= bias <= 100):
            raise InvalidRequest(f"logit_bias.{token}: {bias} is not from -100 to 100")
