"""The attention of one pass, as the model's layers see it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from training.engine.torch.attention.variants import PLAIN, Variant


class Attention(ABC):
    """The attention of one pass."""

    @abstractmethod
    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        variant: Variant = PLAIN,
    ) -> Tensor:
        """Attention of one layer over the whole stream.

        Called once per layer and pass, layers in order from 0.

        Args:
            layer_idx: The index of the calling layer.
            query: (T, Hq, D), rotated.
            key: (T, Hkv, D), rotated; Hq is a multiple of Hkv, and query heads
                ``h * Hq / Hkv`` onwards share key head h.
            value: (T, Hkv, D).
            scaling: Multiplies the scores before the softmax.
            variant: Which earlier keys a query sees, and how its scores are changed.

        Returns:
            (T, Hq, D), in the queries' dtype.
        """
