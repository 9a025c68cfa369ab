"""Attention inside each sequence of a packed stream, and the way transformers calls it.

``packed_attention`` is registered under the name ``packed``; a model loaded with
``attn_implementation="packed"`` gets no mask from transformers and hands its rotated queries,
keys and values to the ``Attention`` of the current ``PackedContext``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from training.engine.packed import Attention, PackedContext

ATTENTION_NAME = "packed"

REFUSED_ARGUMENTS = ("softcap", "s_aux", "sinks", "position_bias", "head_mask")
"""Attention variants whose arguments we would have to honour and do not."""

MATH_TOKENS = 256
"""Up to this length the fused bfloat16 kernel of a CPU takes longer than plain matrix products: its
backward is two to four times slower at 40 to 128 tokens, and faster again at 512 (measured)."""


class UnsupportedAttention(Exception):
    """The base model's attention needs something that the packed attention does not do."""


class SequenceAttention(Attention):
    """Causal attention of whole sequences: nothing cached, every key is in the stream."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """``lengths``: tokens of each sequence, in stream order; they add up to T."""
        # Neighbours of equal length share one kernel call.
        self._groups = [(length, len(list(run))) for length, run in groupby(lengths)]
        self._group_rows = [length * count for length, count in self._groups]

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        # split, not slicing: its backward is one concatenation however many sequences there are.
        outputs = [
            _causal_attention(q, k, v, group, scaling)
            for q, k, v, group in zip(
                query.split(self._group_rows),
                key.split(self._group_rows),
                value.split(self._group_rows),
                self._groups,
                strict=True,
            )
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)  # (T, Hq, D)


def _causal_attention(
    query: Tensor, key: Tensor, value: Tensor, group: tuple[int, int], scaling: float
) -> Tensor:
    """``count`` sequences of one length, adjacent in the stream: (rows, H, D) in and out."""
    length, count = group
    q, k, v = (
        rows.unflatten(0, (count, length)).transpose(1, 2)  # (count, H, length, D)
        for rows in (query, key, value)
    )
    slow_backward = q.device.type == "cpu" and q.dtype == torch.bfloat16
    use_math = slow_backward and length <= MATH_TOKENS
    with sdpa_kernel(SDPBackend.MATH) if use_math else nullcontext():
        output = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    return output.transpose(1, 2).flatten(0, 1)  # (rows, Hq, D)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_context: PackedContext,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """What transformers calls in each attention layer.

    Args:
        query: (1, Hq, T, D).
        key: (1, Hkv, T, D).
        value: Likewise.

    Returns:
        (1, T, Hq, D), and no attention weights.
    """
    for name in REFUSED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(f"The base model's attention uses {name}.")
    output = packed_context.attention.attend(
        _layer_idx(module),
        query[0].transpose(0, 1),  # (T, Hq, D)
        key[0].transpose(0, 1),  # (T, Hkv, D)
        value[0].transpose(0, 1),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return output[None], None  # (1, T, Hq, D)


def _layer_idx(module: nn.Module) -> int:
    layer_idx = module.layer_idx
    if not isinstance(layer_idx, int):
        raise UnsupportedAttention("The base model does not number its attention layers.")
    return layer_idx


AttentionInterface.register(ATTENTION_NAME, packed_attention)
