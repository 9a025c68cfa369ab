"""Variants of a layer's attention: windows, chunks, caps and sinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FUSES_PLAIN_ON = ("cuda",)
"""Devices on which torch's fused kernel computes layers with plain scores."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The tokens of its sequence that a token sees: all up to itself, or only the nearest."""

    window: int | None = None
    """Number of visible tokens, itself included; None is no limit."""
    chunk: int | None = None
    """Length of the chunks into which sequences are cut; a token sees its own chunk. None is no
    limit."""

    @property
    def limit(self) -> int | None:
        """Up to this length every token of a sequence sees all earlier ones; None: at any
        length."""
        return min((n for n in (self.window, self.chunk) if n is not None), default=None)

    def covers(self, num_tokens: int) -> bool:
        """Whether every token of a sequence of this length sees all earlier ones."""
        return self.limit is None or num_tokens <= self.limit

    def first_key(self, position: int) -> int:
        """The first position that the token at ``position`` sees."""
        first = 0 if self.window is None else max(0, position - self.window + 1)
        return first if self.chunk is None else max(first, position // self.chunk * self.chunk)

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(Q, K) bool: whether the token at each position (Q,) sees that at each (K,)."""
        q, k = queries[:, None], keys[None]
        seen = k <= q
        if self.window is not None:
            seen = seen & (k > q - self.window)
        if self.chunk is not None:
            seen = seen & (k // self.chunk == q // self.chunk)
        return seen


EVERYTHING = Reach()


@dataclass(frozen=True, kw_only=True, eq=False)
class Variant:
    """One layer's variant of attention."""

    reach: Reach = EVERYTHING
    softcap: float | None = None
    """Scores pass through ``softcap * tanh(score / softcap)``."""
    sinks: Tensor | None = None
    """(Hq,) a score for each query head that is part of the softmax but has no value."""

    @property
    def has_plain_scores(self) -> bool:
        """Whether only the visible keys differ, so that fused kernels can be used."""
        return self.softcap is None and self.sinks is None

    def is_fused_on(self, device: torch.device) -> bool:
        """Whether torch's fused kernel computes the layer there while sampling."""
        return device.type in FUSES_PLAIN_ON and self.has_plain_scores


PLAIN = Variant()
