"""Attention inside each sequence of a packed stream, called by transformers.

``packed_attention`` is registered under the name ``packed``; a model loaded with
``attn_implementation="packed"`` gets no mask from transformers and passes its rotated queries,
keys and values to the ``Attention`` of the current ``PackedContext``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from training.engine.torch.attention.variants import PLAIN, Reach, Variant
from training.engine.torch.packing.stream import ContextHolder, PackedContext

ATTENTION_NAME = "packed"

WITHOUT_EFFECT = ("position_ids", "use_cache")
"""Arguments of transformers that do not change a layer's attention."""

CHUNK_ATTRIBUTE = "packed_attention_chunk"
HOLDER_ATTRIBUTE = "packed_context_holder"
"""The attribute that ``prepare_layers`` sets on attention layers."""


class UnsupportedAttention(Exception):
    """The base model's attention needs a feature that the packed attention does not have."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_context: PackedContext | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each attention layer.

    Args:
        query: (1, Hq, T, D).
        key: (1, Hkv, T, D).
        value: Likewise.
        packed_context: None if a layer does not pass on its model's arguments.

    Returns:
        (1, T, Hq, D), and no attention weights.
    """
    if packed_context is None:
        packed_context = _current_context(module)
    output = packed_context.attention.attend(
        _layer_idx(module),
        query[0].transpose(0, 1),  # (T, Hq, D)
        key[0].transpose(0, 1),  # (T, Hkv, D)
        value[0].transpose(0, 1),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        _variant(module, **kwargs),
    )
    return output[None], None  # (1, T, Hq, D)


def _variant(
    module: nn.Module,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> Variant:
    """The variant from transformers' arguments for kernels without a mask, which omit chunks.

    Raises:
        UnsupportedAttention: One of them could change the attention, and is not known here.
    """
    if is_causal is False:
        raise UnsupportedAttention("The base model's attention reads later tokens.")
    if dropout:
        raise UnsupportedAttention("The base model's attention uses dropout.")
    for name, value in others.items():
        if name not in WITHOUT_EFFECT and value is not None and value is not False:
            raise UnsupportedAttention(f"The base model's attention uses {name}.")
    if s_aux is None:
        s_aux = sinks
    chunk: int | None = getattr(module, CHUNK_ATTRIBUTE, None)
    if sliding_window is None and chunk is None and softcap is None and s_aux is None:
        return PLAIN
    reach = Reach(window=sliding_window, chunk=chunk)
    return Variant(reach=reach, softcap=softcap, sinks=s_aux)


def prepare_layers(model: nn.Module, config: PreTrainedConfig, holder: ContextHolder) -> None:
    """Set the attributes that transformers does not pass to the layers' attention.

    Layers with chunks get their length. All layers get the current context, because
    some do not pass on their model's arguments.
    """
    layer_types = getattr(config, "layer_types", None) or []
    for module in model.modules():
        layer_idx = getattr(module, "layer_idx", None)
        if not isinstance(layer_idx, int):
            continue
        setattr(module, HOLDER_ATTRIBUTE, holder)
        if layer_types[layer_idx:][:1] == ["chunked_attention"]:
            setattr(module, CHUNK_ATTRIBUTE, config.attention_chunk_size)


def _current_context(module: nn.Module) -> PackedContext:
    holder = getattr(module, HOLDER_ATTRIBUTE, None)
    context = holder.current if isinstance(holder, ContextHolder) else None
    if not isinstance(context, PackedContext):
        raise UnsupportedAttention("The base model's attention does not know its pass.")
    return context


def _layer_idx(module: nn.Module) -> int:
    layer_idx = module.layer_idx
    if not isinstance(layer_idx, int):
        raise UnsupportedAttention("The base model does not number its attention layers.")
    return layer_idx


AttentionInterface.register(ATTENTION_NAME, packed_attention)
