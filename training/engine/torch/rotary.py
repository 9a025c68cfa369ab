"""Rotary factors that depend on the length of each sequence.

A model with ``longrope`` (Phi-3.5, Phi-4-mini) has two sets of factors: one for sequences up to the
length that it was first trained on, one for longer ones. transformers chooses by the largest
position of the whole pass, so in a packed stream one long sequence would change all the others.
Here each row gets the factors of its own sequence:

- in training and scoring, a sequence is the datum's or prompt's tokens, as in one pass of
  transformers over it alone;
- while sampling, it is the tokens so far. After the token that makes it longer than the switch,
  all earlier tokens are read again, as in transformers' ``generate``, because the cached keys were
  rotated with the other factors.

So a sampled token's log-probability equals that of one pass over the tokens before it. One pass
over the finished, longer sequence gives other values for the tokens before the switch; this is a
property of these models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from training.engine.torch.packing.stream import ContextHolder, PackedContext

LONGROPE = "longrope"


def rotary_switch_of(model: nn.Module) -> int | None:
    """The longest sequence with the factors for short ones; None if they never change.

    Also None if they change in a way that ``follow_lengths`` does not support.
    """
    lengths = {_switch_of(module) for module in _longrope_modules(model)}
    return lengths.pop() if len(lengths) == 1 else None


def follow_lengths(model: nn.Module, holder: ContextHolder, switch: int) -> None:
    """Make each row of a pass use the factors of its own sequence."""
    for module in _longrope_modules(model):
        module.forward = partial(_by_sequence, module.forward, holder, switch)


def follow_the_pass(model: nn.Module) -> None:
    """Undo ``follow_lengths``."""
    for module in _longrope_modules(model):
        vars(module).pop("forward", None)


def _by_sequence(
    forward: Callable[..., tuple[Tensor, Tensor]],
    holder: ContextHolder,
    switch: int,
    x: Tensor,
    position_ids: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The results of a rotary module: cosines and sines, (1, T, D) each."""
    context = holder.current
    is_long = context.is_long if isinstance(context, PackedContext) else None
    if is_long is None:
        return forward(x, position_ids, *args, **kwargs)
    # One position beyond the switch makes a whole call long; without any, the call is short.
    beyond = position_ids.new_full((1, 1), switch)
    long = forward(x, torch.cat([position_ids, beyond], dim=1), *args, **kwargs)
    short = forward(x, position_ids.masked_fill(is_long, 0), *args, **kwargs)
    cos, sin = (
        torch.where(is_long[None, :, None], of_long[:, :-1], of_short)
        for of_long, of_short in zip(long, short, strict=True)
    )
    return cos, sin


def _longrope_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _switch_of(module) is not None]


def _switch_of(module: nn.Module) -> int | None:
    rope_type = getattr(module, "rope_type", None)
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    if isinstance(rope_type, dict):  # a set of factors for each kind of layer
        lengths = {
            parameters[kind]["original_max_position_embeddings"]
            for kind, each in rope_type.items()
            if each == LONGROPE
        }
        return lengths.pop() if len(lengths) == 1 else None
    return parameters["original_max_position_embeddings"] if rope_type == LONGROPE else None
