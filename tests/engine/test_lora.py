"""A linear layer with many segments: no segment's result depends on its batch-mates."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from training.engine.torch.adapters import AdapterLayout, AdapterTensors, LoraShape
from training.engine.torch.attention.sequences import SequenceAttention
from training.engine.torch.lora_linear import LoraLinear
from training.engine.torch.packing.ranges import whole_sequences
from training.engine.torch.packing.stream import (
    MIN_ROWS,
    RANK_MULTIPLE,
    ContextHolder,
    PackedContext,
    Segment,
    join,
)
from training.types import LoraConfig

NAME = "layer"
LENGTHS = [40, 16, 91, 17, 5, 33, 16]
Numbers = tuple[torch.Tensor, ...]


def random_weights(rank: int, shape: LoraShape) -> AdapterTensors:
    layout = AdapterLayout(LoraConfig(rank=rank), {NAME: shape})
    generator = torch.Generator().manual_seed(rank)
    return AdapterTensors(layout, 0.1 * torch.randn(layout.num_parameters, generator=generator))


def run(
    base: nn.Linear,
    weights: AdapterTensors,
    lengths: Sequence[int],
    x: torch.Tensor,
    g: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Output, gradient of x (T, ...), and the adapter's gradient by segment."""
    segments, start = [], 0
    for length in lengths:
        grad = AdapterTensors(weights.layout, torch.zeros_like(weights.flat))
        segments.append(Segment(start=start, end=start + length, weights=weights, grad=grad))
        start += length
    holder = ContextHolder()
    context = PackedContext(
        segments=segments, attention=SequenceAttention(whole_sequences(lengths))
    )
    leaf = x.clone().requires_grad_()
    with holder.active(context):
        output = LoraLinear(base, NAME, holder)(leaf)
    output.backward(g)
    assert leaf.grad is not None
    return output.detach(), leaf.grad, [s.grad.flat for s in segments if s.grad is not None]


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [LoraShape(16, 32), LoraShape(576, 192)], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 8, 32])
def test_a_segments_bits_are_those_it_has_alone(
    rank: int, shape: LoraShape, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    base = nn.Linear(shape.in_features, shape.out_features, bias=False, dtype=dtype)
    # Padding: streams are padded so that few rows use the base layer's kernels for many.
    base.requires_grad_(False).weight.zero_()
    weights = random_weights(rank, shape)
    x = torch.randn(sum(LENGTHS), shape.in_features).to(dtype)
    g = torch.randn(sum(LENGTHS), shape.out_features).to(dtype)
    output, grad_x, grads = run(base, weights, LENGTHS, x, g)
    start = 0
    for length, grad in zip(LENGTHS, grads, strict=True):
        rows = slice(start, start + length)
        alone = run(base, weights, [length], x[rows].clone(), g[rows].clone())
        assert torch.equal(output[rows], alone[0]), length
        assert torch.equal(grad_x[rows], alone[1]), length
        assert torch.equal(grad, alone[2][0]), length
        start += length


def test_neighbours_of_one_adapter_are_joined_unless_they_are_small() -> None:
    shape = LoraShape(4, 4)
    even, odd = (random_weights(rank, shape) for rank in (RANK_MULTIPLE, RANK_MULTIPLE + 1))

    def groups(*parts: tuple[AdapterTensors | None, int]) -> list[list[int]]:
        segments, start = [], 0
        for weights, length in parts:
            segments.append(Segment(start=start, end=start + length, weights=weights))
            start += length
        return [[segment.end - segment.start for segment in group] for group in join(segments)]

    n = MIN_ROWS
    assert groups((even, n), (even, n + 1), (even, n + 2)) == [[n, n + 1, n + 2]]
    assert groups((even, n), (even, n - 1), (even, n)) == [[n], [n - 1], [n]]
    assert groups((odd, n), (odd, n)) == [[n, n]]
    assert groups((None, n), (None, n)) == [[n], [n]]
    other = random_weights(RANK_MULTIPLE, shape)
    assert groups((even, n), (other, n), (other, n)) == [[n], [n, n]]
