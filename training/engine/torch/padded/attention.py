"""transformers' own fused attention, one sequence at a time where that keeps bits.

The last bits of the fused CPU kernel's results depend on the thread that computes a sequence, and
so on its batch-mates. So on a CPU each sequence gets a call of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FUSED = "sdpa"
SEPARATE = "separate_sdpa"


def separate_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each attention layer: (B, L, Hq, D).

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, K, D), and ``value`` likewise.
        attention_mask: (B or 1, 1, L, K), or None.
    """
    if len(query) == 1 or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    masks = [None] * len(query) if attention_mask is None else _rows(attention_mask, len(query))
    outputs = [
        sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0]
        for q, k, v, mask in zip(*(x.split(1) for x in (query, key, value)), masks, strict=True)
    ]
    return torch.cat(outputs), None


def _rows(mask: Tensor, count: int) -> list[Tensor]:
    return list(mask.expand(count, *mask.shape[1:]).split(1))


def use_separate_attention(model: PreTrainedModel) -> None:
    """Replace the fused attention in a model that allows it."""
    config = model.config.get_text_config()
    if config._attn_implementation == FUSED and type(model)._can_set_attn_implementation():
        model.set_attn_implementation(SEPARATE)


AttentionInterface.register(SEPARATE, separate_attention)
AttentionMaskInterface.register(SEPARATE, sdpa_mask)
