"""How a layer's attention may differ from the plain one: windows, chunks, caps and sinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Which tokens of its sequence a token sees: of those up to itself, all or the nearest."""

    window: int | None = None
    """So many, itself included; None is no limit."""
    chunk: int | None = None
    """Those of its own chunk, if sequences are cut into chunks of so many; None is no limit."""

    @property
    def limit(self) -> int | None:
        """Up to this length every token of a sequence sees all before it; None: at any length."""
        return min((n for n in (self.window, self.chunk) if n is not None), default=None)

    def covers(self, num_tokens: int) -> bool:
        """Whether every token of a sequence of so many sees all before it."""
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
    """How one layer's attention differs from the plain one."""

    reach: Reach = EVERYTHING
    softcap: float | None = None
    """Scores pass through ``softcap * tanh(score / softcap)``."""
    sinks: Tensor | None = None
    """(Hq,) a score for each query head that takes part in the softmax and brings no value."""

    @property
    def has_plain_scores(self) -> bool:
        """Whether only which keys are seen may differ, so that fused kernels are right."""
        return self.softcap is None and self.sinks is None

    def shares(self, scores: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
        """What each key contributes: the softmax over the last dimension, with caps and sinks.

        Args:
            scores: (..., K) float32, scaled; used up.
            mask: Added once they are capped: minus infinity where a key is not seen.
            sinks: (..., 1), this variant's, one for each row.
        """
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if mask is not None:
            scores = scores.add_(mask)
        if sinks is None:
            return scores.softmax(-1)
        sinks = sinks.float()
        largest = torch.maximum(scores.amax(-1, keepdim=True), sinks)
        exponents = scores.sub_(largest).exp_()
        return exponents.div_(exponents.sum(-1, keepdim=True) + (sinks - largest).exp())


PLAIN = Variant()
