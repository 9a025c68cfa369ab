"""The linear layer under all adapters at once: base(x) + scale * (x A^T) B^T, per segment.

One autograd function for the whole layer. It keeps x (shared by the layers that read the same
x) and the small x A^T, never writes a base weight's gradient, and adds the gradients of A and B
straight into the segment's flat gradient buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from training.engine.torch.adapters import AdapterTensors
from training.engine.torch.packing.stream import (
    RANK_MULTIPLE,
    ROWS_MULTIPLE,
    ContextHolder,
    PassContext,
    Segment,
    SingleContext,
    fewest_rows,
    round_up,
    rows_of,
)


class LoraLinear(nn.Module):
    """A frozen linear layer with the adapters of the current pass; without a pass, only the layer
    itself."""

    adds_gradient = True
    """False if another process adds the gradient of the same rows."""

    def __init__(self, base: nn.Linear, name: str, holder: ContextHolder) -> None:
        """``name``: the module's dotted name in the base model, which keys adapter layouts."""
        super().__init__()
        self.base = base
        self.name = name
        self.holder = holder
        # Makes the output require a gradient if the input does not: in the first layer that
        # is trained. Layers before it take no part in the backward pass.
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., T, in) -> (..., T, out)."""
        context = self.holder.current
        self.holder.on_progress()
        if context is None:
            output: Tensor = self.base(x)
            return output
        rows = x.flatten(0, -2)  # (T, in)
        if isinstance(context, SingleContext):
            return self._of_one_adapter(rows, context).view(*x.shape[:-1], -1)
        anchor = self._anchor if self._is_trained_by(context) else None
        if torch.is_grad_enabled() and (anchor is not None or rows.requires_grad):
            output = _LoraFunction.apply(  # type: ignore[no-untyped-call]  # torch has no types
                rows, anchor, self, context
            )
        else:
            output, _ = _forward(rows, self, context)
        return output.view(*x.shape[:-1], -1)  # (..., T, out)

    def _of_one_adapter(self, rows: Tensor, context: SingleContext) -> Tensor:
        """(n, out) of few rows (n, in), which are padded meanwhile."""
        if self.holder.beside is not None:
            return self.holder.beside.product(self, rows, context)
        num_rows = context.enough_rows(len(rows))
        padded = pad(rows, (0, 0, 0, num_rows - len(rows)))
        output, _ = _forward(padded, self, context.of(num_rows))
        return output[: len(rows)]

    def together(self, rows: Tensor, context: PassContext) -> Tensor:
        """(T, out) of rows (T, in), without a gradient."""
        return _forward(rows, self, context)[0]

    def pair_of(self, tensors: AdapterTensors, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """The layer's A (R, in) and B (out, R) of an adapter; None if it has none."""
        return tensors.pair(self.name, dtype)

    def _is_trained_by(self, context: PassContext) -> bool:
        return any(
            segment.grad is not None and self.name in segment.grad.layout.places
            for segment in context.segments
        )


def _forward(
    x: Tensor, layer: LoraLinear, context: PassContext
) -> tuple[Tensor, list[tuple[list[Segment], Tensor]]]:
    """(T, out), and x A^T (n, R) of each group of joined segments that has this module."""
    output = linear(x, layer.base.weight, layer.base.bias)  # (T, out)
    inner = []
    for group in context.joined:
        weights, rows = group[0].weights, rows_of(group)
        if weights is None:
            continue
        pair = layer.pair_of(weights, x.dtype)
        if pair is None:
            continue
        a, b = even_rank(*pair)
        xa = times(x[rows], a.T)  # (n, R')
        add_times(output[rows], xa, b.T, weights.layout.scale)
        inner.append((group, xa[:, : weights.layout.rank]))
    return output, inner


def even_rank(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A (R', in) and B (out, R') of A (R, in) and B (out, R), with zeros up to a multiple of
    ``RANK_MULTIPLE``: on a CPU a row of other products has other bits among few rows."""
    missing = -len(a) % RANK_MULTIPLE
    if not missing or a.device.type != "cpu":
        return a, b
    return pad(a, (0, 0, 0, missing)), pad(b, (0, missing))


class _LoraFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor | None,
        layer: LoraLinear,
        context: PassContext,
    ) -> Tensor:
        output, inner = _forward(x, layer, context)
        ctx.save_for_backward(x if inner else None, *(xa for _, xa in inner))
        ctx.groups = [group for group, _ in inner]
        ctx.layer = layer
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, *inner = ctx.saved_tensors
        layer: LoraLinear = ctx.layer
        layer.holder.on_progress()
        grad_x = grad_output @ layer.base.weight if ctx.needs_input_grad[0] else None  # (T, in)
        for group, xa in zip(ctx.groups, inner, strict=True):
            weights, rows = group[0].weights, rows_of(group)
            g = grad_output[rows]  # (n, out)
            scale = weights.layout.scale
            pair = layer.pair_of(weights, g.dtype)
            assert pair is not None  # noqa: S101 - the forward pass had it
            a, b = even_rank(*pair)
            gb = times(g, b).mul_(scale)  # (n, R')
            if grad_x is not None:
                add_times(grad_x[rows], gb, a)
            gb = gb[:, : weights.layout.rank]  # (n, R)
            for segment in group:
                if segment.grad is not None and layer.adds_gradient:
                    own = slice(segment.start - rows.start, segment.end - rows.start)
                    grad_a, grad_b = layer.pair_of(segment.grad, torch.float32)  # type: ignore[misc]
                    add_product(grad_a, gb[own].T, x[segment.rows])
                    add_product(grad_b, g[own].T, xa[own], scale)
        return grad_x, None, None, None


def times(rows: Tensor, matrix: Tensor) -> Tensor:
    """(n, N) = rows (n, K) @ matrix (K, N); a row's bits do not depend on the number of rows, nor
    on its place."""
    missing = missing_rows(rows, matrix)
    if not missing:
        return rows @ matrix
    return (pad(rows, (0, 0, 0, missing)) @ matrix)[: len(rows)]


def add_times(target: Tensor, rows: Tensor, matrix: Tensor, scale: float = 1.0) -> None:
    """target (n, N) += scale * rows (n, K) @ matrix (K, N); a row's bits do not depend on the
    number of rows, nor on its place."""
    missing = missing_rows(rows, matrix)
    if not missing:
        target.addmm_(rows, matrix, alpha=scale)
        return
    padded = pad(target, (0, 0, 0, missing))
    padded.addmm_(pad(rows, (0, 0, 0, missing)), matrix, alpha=scale)
    target.copy_(padded[: len(rows)])


def missing_rows(rows: Tensor, matrix: Tensor) -> int:
    """The padding for rows (n, K) in a product with a matrix: see ``ROWS_MULTIPLE``."""
    if rows.device.type != "cpu":
        return 0
    fewest = fewest_rows(rows.device, rows.dtype, matrix.numel())
    return round_up(max(len(rows), fewest), ROWS_MULTIPLE) - len(rows)


def add_product(target: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """target += scale * left @ right; ``target`` is float32, the factors may be narrower."""
    if left.dtype == target.dtype:
        target.addmm_(left, right, alpha=scale)
    else:
        target.add_(left @ right, alpha=scale)
