"""How many tokens' keys and values the sampler should hold on this machine."""

from __future__ import annotations

import torch
from torch import Tensor

from training.engine.torch.attention.interface import Attention
from training.engine.torch.attention.variants import PLAIN, Variant
from training.engine.torch.base_model import BaseModel
from training.engine.torch.memory import free_bytes
from training.engine.torch.packing.stream import MIN_ROWS, PackedContext, uniform_segments

FEWEST_TOKENS = 32_768
"""Held at least, whatever is free: what was accepted before a restart must not be refused after
it."""

SHARE = 4
"""One part in so many of the free memory."""


def default_cache_tokens(base_model: BaseModel, *, num_sharing: int = 1) -> int:
    """As many tokens as fit into a share of the device's free memory.

    Args:
        num_sharing: Base models, this one included, that share the memory.
    """
    if base_model.is_padded:
        return FEWEST_TOKENS  # transformers' own caches, of many kinds
    share = free_bytes(base_model.device) // SHARE // num_sharing
    return max(FEWEST_TOKENS, share // bytes_per_token(base_model))


@torch.no_grad()
def bytes_per_token(base_model: BaseModel) -> int:
    """The bytes of a token's keys and values in all layers, as a pass makes them."""
    sizes = _Sizes()
    tokens = torch.zeros(MIN_ROWS, dtype=torch.int64, device=base_model.device)
    positions = torch.arange(MIN_ROWS, device=base_model.device)
    context = PackedContext(segments=uniform_segments(MIN_ROWS, None), attention=sizes)
    base_model.hidden_states(tokens, positions, context)
    return sizes.bytes_per_token


class _Sizes(Attention):
    """No attention; it notes the sizes of keys and values."""

    def __init__(self) -> None:
        self.bytes_per_token = 0

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        variant: Variant = PLAIN,
    ) -> Tensor:
        for stored in (key, value):
            self.bytes_per_token += stored[0].numel() * stored.element_size()
        return torch.zeros_like(query, memory_format=torch.contiguous_format)
