"""The experts of a layer under all adapters at once.

The rows of a pass are put in the order of their experts (``grouping``); then come the projections
from the hidden states, the gate, which is the model's own code under autograd, and the projection
back, which also adds up a token's experts (``projections``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.engine.torch.experts.grouping import Grouping, group, rows_multiple
from training.engine.torch.experts.projections import DownFunction, UpFunction
from training.engine.torch.experts.stacks import ExpertStack, Projection
from training.engine.torch.packing.stream import ContextHolder, Segment, SingleContext


class LoraExperts(nn.Module):
    """A frozen stack of experts with the adapters of the current pass; without a pass, only the
    stack itself."""

    def __init__(self, stack: ExpertStack, holder: ContextHolder) -> None:
        super().__init__()
        self.base = stack.module
        self.stack = stack
        self.holder = holder
        shapes = [layer.shape for layer in stack.layers]
        self._width = min(min(shape.in_features, shape.out_features) for shape in shapes)
        self._anchor = torch.zeros((), requires_grad=True)  # see ``LoraLinear``

    def forward(
        self, hidden: Tensor, chosen: Tensor, weights: Tensor, *, rows_per_token: int = 1
    ) -> Tensor:
        """The experts' outputs, added up by token.

        Args:
            hidden: (T, H)
            chosen: (T, k) int64, the experts of each token.
            weights: (T, k), their shares.
            rows_per_token: Of the T rows, how many belong to each token of the pass.

        Returns:
            (T, H)
        """
        context = self.holder.current
        self.holder.on_progress()
        if context is None:
            output: Tensor = self.base(hidden, chosen, weights)
            return output
        if isinstance(context, SingleContext):
            context = context.of(len(hidden))
        segments = [segment.repeated(rows_per_token) for segment in context.segments]
        grouping = self._group(chosen, segments, hidden.dtype)
        inner = self.stack.activate(self._up(hidden, grouping))  # (P, I)
        return self._down(inner, weights, grouping)  # (T, H)

    def _group(self, chosen: Tensor, segments: Sequence[Segment], dtype: torch.dtype) -> Grouping:
        """Group the rows of a pass; see ``grouping``."""
        layers = self.stack.layers
        own, widths = [], [self._width]
        for segment in segments:
            places = () if segment.weights is None else segment.weights.layout.places
            if segment.weights is not None and any(layer.name in places for layer in layers):
                own.append(segment)
                widths.append(segment.weights.layout.rank)
        multiples = [rows_multiple(chosen.device, dtype, self._width * width) for width in widths]
        return group(chosen, own, multiples, num_experts=self.stack.num_experts)

    def _up(self, hidden: Tensor, grouping: Grouping) -> Tensor:
        projection, anchor = self.stack.up, self._anchor_of(self.stack.up, grouping)
        if torch.is_grad_enabled() and (anchor is not None or hidden.requires_grad):
            output: Tensor = UpFunction.apply(  # type: ignore[no-untyped-call]  # torch has no types
                hidden, anchor, projection, grouping, self.holder
            )
            return output
        return UpFunction.compute(hidden, projection, grouping)[0]

    def _down(self, inner: Tensor, weights: Tensor, grouping: Grouping) -> Tensor:
        projection, anchor = self.stack.down, self._anchor_of(self.stack.down, grouping)
        needs_grad = anchor is not None or inner.requires_grad or weights.requires_grad
        if torch.is_grad_enabled() and needs_grad:
            output: Tensor = DownFunction.apply(  # type: ignore[no-untyped-call]
                inner, weights, anchor, projection, grouping, self.holder
            )
            return output
        return DownFunction.compute(inner, weights, projection, grouping)[0]

    def _anchor_of(self, projection: Projection, grouping: Grouping) -> Tensor | None:
        """The anchor, if the pass trains a layer of the projection."""
        is_trained = any(_trains(pairs.segment, projection) for pairs in grouping.segments)
        return self._anchor if is_trained else None


def _trains(segment: Segment, projection: Projection) -> bool:
    grad = segment.grad
    return grad is not None and any(layer.name in grad.layout.places for layer in projection.layers)
