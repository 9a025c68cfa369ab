"""Sequences of a packed stream see themselves only, and each is to the bit what it is alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from training.engine.attention import SequenceAttention
from training.engine.short_attention import SHORT_TOKENS

LENGTHS = [3, 16, 17, 1, 30, SHORT_TOKENS + 5, 16, 31, 2, SHORT_TOKENS + 5, SHORT_TOKENS + 5, 90]
SHAPES = {"tiny": (4, 2, 4), "real": (9, 3, 64), "one head": (1, 1, 8), "equal": (8, 8, 16)}
"""Query heads, key heads, head size."""

Numbers = tuple[torch.Tensor, ...]


def random_stream(lengths: Sequence[int], shape: str, dtype: torch.dtype) -> Numbers:
    """Queries, keys, values and the gradient of what attention makes of them."""
    num_heads, num_key_heads, head_size = SHAPES[shape]
    generator = torch.Generator().manual_seed(len(lengths))
    return tuple(
        torch.randn(sum(lengths), heads, head_size, generator=generator).to(dtype)
        for heads in (num_heads, num_key_heads, num_key_heads, num_heads)
    )


def attend(lengths: Sequence[int], stream: Numbers) -> Numbers:
    """The output and the three gradients."""
    *inputs, grad_output = stream
    q, k, v = (x.clone().requires_grad_() for x in inputs)
    output = SequenceAttention(lengths).attend(0, q, k, v, 0.3)
    grads = torch.autograd.grad(output, (q, k, v), grad_output)
    return output.detach(), *grads


def plain(lengths: Sequence[int], stream: Numbers) -> Numbers:
    """The same by its formula, one sequence after another, in float64."""
    *inputs, grad_output = (x.double() for x in stream)
    q, k, v = (x.requires_grad_() for x in inputs)
    outputs = []
    for one_q, one_k, one_v in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
        group = one_q.shape[1] // one_k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", one_q, one_k.repeat_interleave(group, 1)) * 0.3
        hidden = torch.ones(scores.shape[1:]).triu(1).bool()
        shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", shares, one_v.repeat_interleave(group, 1)))
    output = torch.cat(outputs)
    return output.detach(), *torch.autograd.grad(output, (q, k, v), grad_output)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_formula_forwards_and_backwards(shape: str) -> None:
    stream = random_stream(LENGTHS, shape, torch.float32)
    for ours, expected in zip(attend(LENGTHS, stream), plain(LENGTHS, stream), strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sequences_bits_are_those_it_has_alone(shape: str, dtype: torch.dtype) -> None:
    stream = random_stream(LENGTHS, shape, dtype)
    together = attend(LENGTHS, stream)
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        alone = attend([length], tuple(x[rows] for x in stream))
        for ours, expected in zip(together, alone, strict=True):
            assert torch.equal(ours[rows], expected), length
        start += length


def test_a_sequence_that_is_not_finite_spares_the_others() -> None:
    lengths = [5, 9, 7]
    stream = random_stream(lengths, "tiny", torch.float32)
    expected = attend(lengths, stream)
    for x in stream:
        x[5:14] = float("nan")
    for ours, before in zip(attend(lengths, stream), expected, strict=True):
        assert ours[5:14].isnan().any()
        assert torch.equal(ours[:5], before[:5])
        assert torch.equal(ours[14:], before[14:])
