"""Changes that some families make to the logits of their output head: a factor, a cap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier")
"""Families' names of the factor. Some divide by it, which the name does not show."""

SOFTCAP = "final_logit_softcapping"


@dataclass(frozen=True, kw_only=True)
class LogitShape:
    """Logits are the head's output times a factor, and then capped."""

    factor: float = 1.0
    softcap: float | None = None
    """They pass through ``softcap * tanh(logit / softcap)``."""

    def shape(self, logits: Tensor) -> Tensor:
        """The logits for the head's output, which is overwritten."""
        if self.factor != 1.0:
            logits.mul_(self.factor)
        if self.softcap is not None:
            return logits.div_(self.softcap).tanh_() * self.softcap
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative with respect to the head's output, given the logits (n, V)."""
        if self.softcap is None:
            return self.factor
        return (logits / self.softcap).square_().neg_().add_(1).mul_(self.factor)


PLAIN_LOGITS = LogitShape()


def find_logit_shape(config: Any, head_says: Tensor, logits: Tensor) -> LogitShape:
    """The shape, among a configuration's possible ones, that turns a head's output into the
    logits."""

    def difference(shape: LogitShape) -> float:
        return (shape.shape(head_says.clone()) - logits).abs().max().item()

    return min(_candidates(config), key=difference)


def _candidates(config: Any) -> Iterator[LogitShape]:
    """The plain one first: it is preferred if others are equally close."""
    named = [getattr(config, name, None) for name in FACTORS]
    numbers = [float(x) for x in named if isinstance(x, int | float) and x]
    factors = [1.0, *numbers, *(1 / x for x in numbers)]
    softcap = getattr(config, SOFTCAP, None)
    for cap in (None,) if softcap is None else (None, float(softcap)):
        for factor in factors:
            yield LogitShape(factor=factor, softcap=cap)
