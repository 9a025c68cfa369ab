"""The linear layer under all adapters at once: base(x) + scale * (x A^T) B^T, per segment.

One autograd function for the whole layer. It keeps x (shared by the layers that read the same
x) and the small x A^T, never writes a base weight's gradient, and adds the gradients of A and B
straight into the segment's flat gradient buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from training.engine.torch.adapters import AdapterLayout, AdapterTensors
from training.engine.torch.frozen_products import times_frozen, times_transposed
from training.engine.torch.packing.stream import (
    RANK_MULTIPLE,
    ROWS_MULTIPLE,
    SMALL_PRODUCT,
    ContextHolder,
    PassContext,
    Segment,
    SingleContext,
    fewest_rows,
    round_up,
    rows_of,
)
from training.engine.torch.thread_team import ThreadTeam


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
        if torch.is_grad_enabled():
            anchor = self._anchor if self._is_trained_by(context) else None
            if anchor is not None or rows.requires_grad:
                output = _LoraFunction.apply(  # type: ignore[no-untyped-call]  # torch has no types
                    rows, anchor, self, context
                )
                return output.view(*x.shape[:-1], -1)  # (..., T, out)
        return self.together(rows, context).view(*x.shape[:-1], -1)

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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Update:
    """What an adapter adds to a group's rows of a layer's output."""

    group: Sequence[Segment]
    rows: slice
    layout: AdapterLayout
    a: Tensor
    """(R', in)"""
    b: Tensor
    """(out, R')"""

    @classmethod
    def of(cls, group: Sequence[Segment], layer: LoraLinear, dtype: torch.dtype) -> _Update | None:
        """None if the adapter has nothing for this layer."""
        weights = group[0].weights
        pair = None if weights is None else layer.pair_of(weights, dtype)
        if weights is None or pair is None:
            return None
        a, b = even_rank(*pair)
        return cls(group=group, rows=rows_of(group), layout=weights.layout, a=a, b=b)

    def add(self, output: Tensor, x: Tensor) -> Tensor:
        """Add to some of the group's rows (n, out) the update of x (n, in); returns x A^T."""
        xa = times(x, self.a.T)
        add_times(output, xa, self.b.T, self.layout.scale)
        return xa  # (n, R')

    def add_back(self, grad_x: Tensor | None, grad_output: Tensor) -> Tensor:
        """Likewise, backwards; returns scale * grad_output B (n, R')."""
        gb = times(grad_output, self.b).mul_(self.layout.scale)
        if grad_x is not None:
            add_times(grad_x, gb, self.a)
        return gb

    def own(self, segment: Segment, of_group: Tensor) -> Tensor:
        """A segment's rows of the group's (n, ...)."""
        if len(self.group) == 1:
            return of_group
        return of_group[segment.start - self.rows.start : segment.end - self.rows.start]

    def of_rank(self, inner: Tensor) -> Tensor:
        """(n, R) of (n, R')."""
        return inner if inner.shape[1] == self.layout.rank else inner[:, : self.layout.rank]


def _updates(layer: LoraLinear, groups: Iterable[Sequence[Segment]], like: Tensor) -> list[_Update]:
    found = (_Update.of(group, layer, like.dtype) for group in groups)
    return [update for update in found if update is not None]


def _forward(
    x: Tensor, layer: LoraLinear, context: PassContext
) -> tuple[Tensor, list[tuple[_Update, Tensor]]]:
    """(T, out), and x A^T (n, R') of each group of segments whose adapter has this module."""
    base, team, updates = layer.base, layer.holder.team, _updates(layer, context.adapted, x)
    parts = row_parts(team, x)
    if len(parts) == 1:
        output = times_transposed(x, base.weight, base.bias, team=team)  # (T, out)
        return output, [(u, u.add(output[u.rows], x[u.rows])) for u in updates]
    output = x.new_empty(len(x), base.out_features)

    def compute(part: slice) -> list[Tensor]:
        output[part] = times_transposed(x[part], base.weight, base.bias)
        own = [common_rows(update.rows, part) for update in updates]
        return [u.add(output[rows], x[rows]) for u, rows in zip(updates, own, strict=True)]

    inner = team.run([partial(compute, part) for part in parts])
    return output, list(zip(updates, _joined(inner), strict=True))


def _joined(by_part: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The rows of each update, of which every part has some."""
    return [torch.cat(rows) for rows in zip(*by_part, strict=True)]


def row_parts(team: ThreadTeam, rows: Tensor) -> list[slice]:
    """The parts of rows (n, K) of a product that a team computes.

    One part, if the rows left over from whole blocks would be summed in another order.
    """
    num_rows = rows.shape[0]
    if num_rows % ROWS_MULTIPLE or rows.device.type != "cpu":
        return [slice(0, num_rows)]
    return team.parts(num_rows)


def common_rows(rows: slice, part: slice) -> slice:
    """The rows in a part; there may be none."""
    start, end = max(rows.start, part.start), min(rows.stop, part.stop)
    return slice(start, max(start, end))


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
        kept = [update.of_rank(xa) for update, xa in inner]
        ctx.save_for_backward(x if inner else None, *kept)
        ctx.groups = [update.group for update, _ in inner]
        ctx.layer = layer
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, *inner = ctx.saved_tensors
        layer: LoraLinear = ctx.layer
        layer.holder.on_progress()
        updates = _updates(layer, ctx.groups, grad_output)
        grad_x, scaled = _backward(grad_output, layer, updates, wants_x=ctx.needs_input_grad[0])
        trained = [
            (update, segment, segment.grad, xa, update.of_rank(gb))
            for update, xa, gb in zip(updates, inner, scaled, strict=True)
            for segment in update.group
            if segment.grad is not None and layer.adds_gradient
        ]

        def add_a() -> None:
            for update, segment, grad, _, gb in trained:
                grad_a, _ = layer.pair_of(grad, torch.float32)  # type: ignore[misc]
                add_product(grad_a, update.own(segment, gb).T, x[segment.rows])

        def add_b() -> None:
            for update, segment, grad, xa, _ in trained:
                _, grad_b = layer.pair_of(grad, torch.float32)  # type: ignore[misc]
                own_xa, g = update.own(segment, xa), grad_output[segment.rows]
                add_product(grad_b, g.T, own_xa, update.layout.scale)

        team = layer.holder.team
        if len(row_parts(team, grad_output)) > 1:
            team.run([add_a, add_b])
        else:
            add_a()
            add_b()
        return grad_x, None, None, None


def _backward(
    grad_output: Tensor, layer: LoraLinear, updates: Sequence[_Update], *, wants_x: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradient of x (T, in), if it is wanted, and scale * grad_output B (n, R') of each
    update."""
    weight, team = layer.base.weight, layer.holder.team
    parts = row_parts(team, grad_output)
    grad_x: Tensor | None = None
    if len(parts) == 1:
        if wants_x:
            grad_x = times_frozen(grad_output, weight, team=team)  # (T, in)
        return grad_x, [
            u.add_back(None if grad_x is None else grad_x[u.rows], grad_output[u.rows])
            for u in updates
        ]
    if wants_x:
        grad_x = grad_output.new_empty(len(grad_output), weight.shape[1])

    def compute(part: slice) -> list[Tensor]:
        if grad_x is not None:
            grad_x[part] = times_frozen(grad_output[part], weight)
        scaled = []
        for update in updates:
            rows = common_rows(update.rows, part)
            own = None if grad_x is None else grad_x[rows]
            scaled.append(update.add_back(own, grad_output[rows]))
        return scaled

    by_part = team.run([partial(compute, part) for part in parts])
    return grad_x, _joined(by_part)


def times(rows: Tensor, matrix: Tensor) -> Tensor:
    """(n, N) = rows (n, K) @ matrix (K, N); a row's bits do not depend on the number of rows, nor
    on its place."""
    if _is_small(matrix):
        return times(rows.float(), matrix.float()).to(rows.dtype)
    missing = missing_rows(rows, matrix)
    if not missing:
        return rows @ matrix
    return (pad(rows, (0, 0, 0, missing)) @ matrix)[: len(rows)]


def add_times(target: Tensor, rows: Tensor, matrix: Tensor, scale: float = 1.0) -> None:
    """target (n, N) += scale * rows (n, K) @ matrix (K, N); a row's bits do not depend on the
    number of rows, nor on its place."""
    if _is_small(matrix):
        target.add_(times(rows.float(), matrix.float()), alpha=scale)
        return
    missing = missing_rows(rows, matrix)
    if not missing:
        target.addmm_(rows, matrix, alpha=scale)
        return
    padded = pad(target, (0, 0, 0, missing))
    padded.addmm_(pad(rows, (0, 0, 0, missing)), matrix, alpha=scale)
    target.copy_(padded[: len(rows)])


def _is_small(matrix: Tensor) -> bool:
    """Whether a product with it is computed in float32. For bfloat16 a CPU has two kernels: one
    takes 10 microseconds to begin, and the other, for small products, gives other bits."""
    is_narrow = matrix.dtype == torch.bfloat16 and matrix.device.type == "cpu"
    return is_narrow and 2 * matrix.numel() <= SMALL_PRODUCT


def missing_rows(rows: Tensor, matrix: Tensor) -> int:
    """The padding for rows (n, K) in a product with a matrix: see ``ROWS_MULTIPLE``."""
    if rows.device.type != "cpu":
        return 0
    return _missing(rows.shape[0], matrix.numel(), rows.dtype)


@lru_cache(maxsize=4096)
def _missing(num_rows: int, matrix_size: int, dtype: torch.dtype) -> int:
    """The same for a CPU; every product of every adapter asks."""
    fewest = fewest_rows(torch.device("cpu"), dtype, matrix_size)
    return round_up(max(num_rows, fewest), ROWS_MULTIPLE) - num_rows


def add_product(target: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """target += scale * left @ right; ``target`` is float32, the factors may be narrower."""
    if left.dtype == target.dtype:
        target.addmm_(left, right, alpha=scale)
    elif target.device.type == "cpu" and 2 * target.numel() <= SMALL_PRODUCT:
        target.addmm_(left.float(), right.float(), alpha=scale)
    else:
        target.add_(left @ right, alpha=scale)
