"""Which rectangles of the padded layout several requests may share on a CPU.

The bits of a request must not depend on its batch-mates. In a rectangle they may: a kernel sums in
an order that depends on its operands' layout in memory, or computes a function of few numbers
otherwise than of many. ``even_products`` removes the most frequent reason; whether others are left
is a property of the model's own code. So it is tried: requests in one rectangle are compared with
each alone, forwards and backwards, to the bit, in the dtype and with the threads of this process.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from training.engine.probe.stock_answers import StockAnswers
from training.engine.torch.adapters import AdapterTensors
from training.engine.torch.base_model import BaseModel
from training.engine.torch.packing.ranges import whole_sequences
from training.engine.torch.packing.stream import Segment

LENGTHS = (16, 64, 80, 128)
"""Padded lengths that are tried: parts of the chunks of gated delta rules, which are 64 tokens,
whole ones, and one with a part of the next. Longer sequences gain little."""

NUM_REQUESTS = 3
"""In one rectangle: an odd number, so that blocks of a kernel end within a request."""


def longest_shared(base_model: BaseModel, stock: StockAnswers) -> int:
    """The longest of ``LENGTHS`` up to which no bit depends on other requests; 0: none."""
    longest = 0
    if not base_model.is_padded or base_model.device.type != "cpu":
        return longest
    with stock.few_layers.alone(in_float32=False):
        for length in LENGTHS:
            if length > base_model.info.max_context_tokens or not _is_shared(
                base_model, stock.weights, length
            ):
                break
            longest = length
    return longest


def _is_shared(base_model: BaseModel, weights: AdapterTensors, length: int) -> bool:
    """Whether requests of this length give the same bits in one rectangle as each alone."""
    generator = torch.Generator().manual_seed(length)
    shape = (NUM_REQUESTS, length)
    tokens = torch.randint(base_model.info.vocab_size, shape, generator=generator)
    together = _Pass(replace(base_model, shared_tokens=length), weights, tokens)
    for i in (0, NUM_REQUESTS - 1):
        alone = _Pass(base_model, weights, tokens[i : i + 1])
        own = slice(i * length, (i + 1) * length)
        if not torch.equal(together.hidden[own], alone.hidden):
            return False
        if not torch.equal(together.grads[i].flat, alone.grads[0].flat):
            return False
    return True


class _Pass:
    """The results of requests of one sequence each."""

    def __init__(self, base_model: BaseModel, weights: AdapterTensors, tokens: Tensor) -> None:
        """``tokens``: (B, L) int64."""
        count, length = tokens.shape
        self.grads = [
            AdapterTensors(weights.layout, torch.zeros_like(weights.flat)) for _ in range(count)
        ]
        """The gradient of each request in the update ``weights``."""
        hidden = base_model.sequence_states(
            tokens.flatten(),
            torch.arange(length).repeat(count),
            [
                Segment(start=i * length, end=(i + 1) * length, weights=weights, grad=grad)
                for i, grad in enumerate(self.grads)
            ],
            whole_sequences([length] * count),
        )  # (B * L, C)
        width = torch.arange(hidden.shape[1], dtype=hidden.dtype)
        hidden.backward(torch.cos(width).expand_as(hidden))
        self.hidden = hidden.detach()
