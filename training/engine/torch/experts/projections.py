"""The two products of a layer's experts, forwards and backwards.

As ``lora_linear`` does it for one linear layer, the gradients of A and B go straight into the
segment's flat buffer. The functions keep their inputs and the small products with A, and neither
the rows that are gathered for the experts nor the experts' outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.engine.torch.experts.grouping import Grouping, SegmentPairs, sum_by_token
from training.engine.torch.experts.products import grouped_sums, grouped_times
from training.engine.torch.experts.stacks import ExpertLinear, Projection
from training.engine.torch.lora_linear import add_product, times
from training.engine.torch.packing.stream import ContextHolder


class UpFunction(torch.autograd.Function):
    """(T, H) to (P, outputs): every token by each of its experts."""

    @staticmethod
    def compute(
        hidden: Tensor, projection: Projection, grouping: Grouping
    ) -> tuple[Tensor, list[Tensor]]:
        """The output, and the product with A of each segment and layer: by token (t, R) if A is
        shared, else by pair (n, R)."""
        output = _base_product(hidden.index_select(0, grouping.token), projection, grouping)
        inner = []
        for pairs, layer, a, b in _adapters(projection, grouping, hidden.dtype):
            own = hidden[pairs.segment.rows]  # (t, H)
            if a.ndim == 2:
                xa = times(own, a.T)  # (t, R)
                by_pair = xa.index_select(0, pairs.token)
            else:
                rows = own.index_select(0, pairs.token)  # (n, H)
                xa = by_pair = grouped_times(rows, a.transpose(1, 2), pairs.ends)
            update = grouped_times(by_pair, b.transpose(1, 2), pairs.ends)  # (n, out)
            pairs.add_to(output[:, layer.columns], update, pairs.weights.layout.scale)
            inner.append(xa)
        return output, inner

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        anchor: Tensor | None,
        projection: Projection,
        grouping: Grouping,
        holder: ContextHolder,
    ) -> Tensor:
        output, inner = UpFunction.compute(hidden, projection, grouping)
        ctx.save_for_backward(hidden if inner else None, *inner)
        ctx.rest = (projection, grouping, holder)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        hidden, *inner = ctx.saved_tensors
        projection, grouping, holder = ctx.rest
        holder.on_progress()
        grad_rows: Tensor | None = None
        grad_hidden: Tensor | None = None
        if ctx.needs_input_grad[0]:
            grad_rows = grouped_times(grad, projection.matrices.transpose(1, 2), grouping.ends)
            grad_hidden = torch.zeros(
                len(grouping.position), grad_rows.shape[1], device=grad.device
            )  # (T, H), what is shared by a token's experts
        for (pairs, layer, a, b), xa in zip(
            _adapters(projection, grouping, grad.dtype), inner, strict=True
        ):
            g = pairs.of(grad[:, layer.columns])  # (n, out)
            gb = grouped_times(g, b, pairs.ends).mul_(pairs.weights.layout.scale)  # (n, R)
            own = hidden[pairs.segment.rows]  # (t, H)
            if a.ndim == 2:
                gb = sum_by_token(gb, pairs.position).to(g.dtype)  # (t, R)
                xa = xa.index_select(0, pairs.token)
                if grad_hidden is not None:
                    grad_hidden[pairs.segment.rows] += times(gb, a)
            elif grad_rows is not None:
                pairs.add_to(grad_rows, grouped_times(gb, a, pairs.ends))
            if pairs.segment.grad is None:
                continue
            grad_a, grad_b = layer.own(
                *pairs.segment.grad.layout.pair(pairs.segment.grad.flat, layer.name)
            )
            grad_b.add_(grouped_sums(g, xa, pairs.ends), alpha=pairs.weights.layout.scale)
            if a.ndim == 2:
                add_product(grad_a, gb.T, own)
            else:
                grad_a.add_(grouped_sums(gb, own.index_select(0, pairs.token), pairs.ends))
        if grad_hidden is not None and grad_rows is not None:
            grad_hidden += sum_by_token(grad_rows, grouping.position)
            grad_hidden = grad_hidden.to(grad.dtype)
        return grad_hidden, None, None, None, None


class DownFunction(torch.autograd.Function):
    """(P, inner) to (T, H): back to the hidden states, a token's experts added up."""

    @staticmethod
    def compute(
        inner: Tensor, weights: Tensor, projection: Projection, grouping: Grouping
    ) -> tuple[Tensor, list[Tensor]]:
        """The output, and the product (n, R) with A of each segment."""
        rows = _base_product(inner, projection, grouping)  # (P, H)
        by_segment = []
        shared = []
        for pairs, _, a, b in _adapters(projection, grouping, inner.dtype):
            xa = grouped_times(pairs.of(inner), a.transpose(1, 2), pairs.ends)  # (n, R)
            if b.ndim == 2:
                total = _weighted(xa, weights, pairs)  # (t, R)
                shared.append((pairs, times(total, b.T)))
            else:
                update = grouped_times(xa, b.transpose(1, 2), pairs.ends)  # (n, H)
                pairs.add_to(rows, update, pairs.weights.layout.scale)
            by_segment.append(xa)
        output = sum_by_token(rows, grouping.position, weights)  # (T, H)
        for pairs, update in shared:
            output[pairs.segment.rows].add_(update, alpha=pairs.weights.layout.scale)
        return output.to(inner.dtype), by_segment

    @staticmethod
    def forward(
        ctx: Any,
        inner: Tensor,
        weights: Tensor,
        anchor: Tensor | None,
        projection: Projection,
        grouping: Grouping,
        holder: ContextHolder,
    ) -> Tensor:
        output, by_segment = DownFunction.compute(inner, weights, projection, grouping)
        ctx.save_for_backward(inner, weights, *by_segment)
        ctx.rest = (projection, grouping, holder)
        return output

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        inner, weights, *by_segment = ctx.saved_tensors
        projection, grouping, holder = ctx.rest
        holder.on_progress()
        g = grad.index_select(0, grouping.token)  # (P, H), of the output before its share
        share = grouping.weights(weights)[:, None].to(grad.dtype)  # (P, 1)
        back = grouped_times(g, projection.matrices.transpose(1, 2), grouping.ends)  # (P, inner)
        for (pairs, layer, a, b), xa in zip(
            _adapters(projection, grouping, grad.dtype), by_segment, strict=True
        ):
            scale = pairs.weights.layout.scale
            own = grad[pairs.segment.rows]  # (t, H)
            if b.ndim == 2:
                gb = times(own, b).mul_(scale).index_select(0, pairs.token)  # (n, R)
            else:
                gb = grouped_times(pairs.of(g), b, pairs.ends).mul_(scale)  # (n, R)
            pairs.add_to(back, grouped_times(gb, a, pairs.ends))
            if pairs.segment.grad is None:
                continue
            grad_a, grad_b = layer.own(
                *pairs.segment.grad.layout.pair(pairs.segment.grad.flat, layer.name)
            )
            own_share = pairs.of(share)
            grad_a.add_(grouped_sums(gb * own_share, pairs.of(inner), pairs.ends))
            if b.ndim == 2:
                add_product(grad_b, own.T, _weighted(xa, weights, pairs), scale)
            else:
                grad_b.add_(grouped_sums(pairs.of(g) * own_share, xa, pairs.ends), alpha=scale)
        grad_weights = None
        if ctx.needs_input_grad[1]:
            by_row = (back * inner).sum(-1, dtype=torch.float32)  # (P,)
            if projection.bias is not None:
                by_row += (g * projection.bias[grouping.expert]).sum(-1, dtype=torch.float32)
            grad_weights = by_row[grouping.position].to(weights.dtype)  # (T, k)
        return back.mul_(share), grad_weights, None, None, None, None


def _base_product(rows: Tensor, projection: Projection, grouping: Grouping) -> Tensor:
    """(P, outputs) of the stack itself."""
    output = grouped_times(rows, projection.matrices, grouping.ends)
    if projection.bias is not None:
        output += projection.bias[grouping.expert]
    return output


def _adapters(
    projection: Projection, grouping: Grouping, dtype: torch.dtype
) -> list[tuple[SegmentPairs, ExpertLinear, Tensor, Tensor]]:
    """Each segment's A and B of each layer of a projection."""
    found = [
        (pairs, layer, pairs.weights.pair(layer.name, dtype))
        for pairs in grouping.segments
        for layer in projection.layers
    ]
    return [(pairs, layer, *layer.own(*pair)) for pairs, layer, pair in found if pair is not None]


def _weighted(xa: Tensor, weights: Tensor, pairs: SegmentPairs) -> Tensor:
    """(t, R): the products (n, R) of a token's experts, added up by their shares."""
    total = sum_by_token(xa, pairs.position, weights[pairs.segment.rows])
    return total.to(xa.dtype)
