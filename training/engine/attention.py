"""Attention inside each sequence of a packed stream, and the way transformers calls it.

``packed_attention`` is registered under the name ``packed``; a model loaded with
``attn_implementation="packed"`` gets no mask from transformers and hands its rotated queries,
keys and values to the ``Attention`` of the current ``PackedContext``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from training.engine.packed import Attention, PackedContext
from training.engine.short_attention import (
    SHORT_TOKENS,
    Bucket,
    make_buckets,
    short_attention,
)

ATTENTION_NAME = "packed"

REFUSED_ARGUMENTS = ("softcap", "s_aux", "sinks", "position_bias", "head_mask")
"""Attention variants whose arguments we would have to honour and do not."""


class UnsupportedAttention(Exception):
    """The base model's attention needs something that the packed attention does not do."""


class SequenceAttention(Attention):
    """Causal attention of whole sequences: nothing cached, every key is in the stream."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """``lengths``: tokens of each sequence, in stream order; they add up to T."""
        self._lengths = lengths
        self._runs: list[_Run] = []
        self._buckets: list[Bucket] = []

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        if not self._runs:
            self._divide(on_cpu=query.device.type == "cpu")
        rows = [run.num_rows for run in self._runs]
        short = [i for i, run in enumerate(self._runs) if run.is_short]
        if len(short) == len(rows):
            return short_attention(query, key, value, self._buckets, scaling)
        # split, not slicing: its backward is one concatenation however many runs there are.
        q, k, v = (x.split(rows) for x in (query, key, value))
        outputs = {
            i: _long_attention(q[i], k[i], v[i], run, scaling)
            for i, run in enumerate(self._runs)
            if not run.is_short
        }
        if short:
            sq, sk, sv = (torch.cat([x[i] for i in short]) for x in (q, k, v))
            together = short_attention(sq, sk, sv, self._buckets, scaling)
            outputs |= zip(short, together.split([rows[i] for i in short]), strict=True)
        return torch.cat([outputs[i] for i in range(len(rows))])  # (T, Hq, D)

    def _divide(self, *, on_cpu: bool) -> None:
        """On a CPU short sequences are taken together and the others one by one (its fused
        float32 kernel gives some shapes other last bits in a batch); on a GPU neighbours of
        equal length share a call."""

        def company(numbered: tuple[int, int]) -> tuple[bool, int]:
            index, length = numbered
            if not on_cpu:
                return False, length
            return (True, 0) if length <= SHORT_TOKENS else (False, index)

        for (is_short, _), run in groupby(enumerate(self._lengths), company):
            lengths = [length for _, length in run]
            self._runs.append(_Run(tuple(lengths), is_short))
        self._buckets = make_buckets([n for run in self._runs if run.is_short for n in run.lengths])


@dataclass(frozen=True)
class _Run:
    """Neighbouring sequences of the stream: short ones, or others of one length."""

    lengths: tuple[int, ...]
    """Tokens of each."""
    is_short: bool

    @property
    def num_rows(self) -> int:
        return sum(self.lengths)


def _long_attention(query: Tensor, key: Tensor, value: Tensor, run: _Run, scaling: float) -> Tensor:
    """Sequences of one length, adjacent in the stream: (rows, H, D) in and out."""
    q, k, v = (
        rows.unflatten(0, (-1, run.lengths[0])).transpose(1, 2)  # (count, H, length, D)
        for rows in (query, key, value)
    )
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
