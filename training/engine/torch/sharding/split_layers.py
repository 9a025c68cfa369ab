"""Layers of which each rank has a part: tensor and expert parallelism.

Adapters are whole on every rank, and a rank uses the part of A or B that belongs to its part of the
layer. What is computed by parts is linear in them, so a rank's gradient of A and B is a part of the
whole one too: after a pass one sum over the ranks makes it complete.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.engine.torch.adapters import AdapterTensors
from training.engine.torch.experts.lora_experts import LoraExperts
from training.engine.torch.experts.stacks import ExpertStack
from training.engine.torch.lora_linear import LoraLinear
from training.engine.torch.packing.stream import ContextHolder
from training.engine.torch.sharding.rank_group import (
    RankGroup,
    add_up_gradients,
    add_up_outputs,
)


def own_part(size: int, group: RankGroup) -> slice:
    """This rank's part of so many, which must be a multiple of the number of ranks."""
    each = size // group.size
    return slice(group.rank * each, (group.rank + 1) * each)


class ColumnSplitLinear(LoraLinear):
    """A layer of whose outputs each rank computes a part, from the same input."""

    def __init__(self, base: nn.Linear, name: str, holder: ContextHolder, group: RankGroup) -> None:
        """``base``: the whole layer's sizes, with this rank's part of weight and bias."""
        super().__init__(base, name, holder)
        self._ranks = group
        self._outputs = own_part(base.out_features, group)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., T, in) -> (..., T, out / ranks)"""
        return super().forward(add_up_gradients(x, self._ranks))

    def pair_of(self, tensors: AdapterTensors, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        pair = super().pair_of(tensors, dtype)
        return None if pair is None else (pair[0], pair[1][self._outputs])


class RowSplitLinear(LoraLinear):
    """A layer of whose inputs each rank has a part; the ranks' outputs are added up."""

    def __init__(self, base: nn.Linear, name: str, holder: ContextHolder, group: RankGroup) -> None:
        """``base``: the whole layer's sizes, with this rank's part of the weight."""
        super().__init__(base, name, holder)
        self._ranks = group
        self._inputs = own_part(base.in_features, group)
        self._bias = base.bias  # added once, after the sum
        base.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., T, in / ranks) -> (..., T, out)"""
        output = add_up_outputs(super().forward(x), self._ranks)
        return output if self._bias is None else output + self._bias

    def pair_of(self, tensors: AdapterTensors, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        pair = super().pair_of(tensors, dtype)
        return None if pair is None else (pair[0][:, self._inputs], pair[1])


class RepeatedLinear(LoraLinear):
    """A layer that every rank has and computes as a whole; the first one adds its gradient."""

    def __init__(self, base: nn.Linear, name: str, holder: ContextHolder, group: RankGroup) -> None:
        super().__init__(base, name, holder)
        self.adds_gradient = group.is_first


class SplitExperts(LoraExperts):
    """The experts of a layer, of which each rank has some, or a part of each."""

    def __init__(self, stack: ExpertStack, holder: ContextHolder, group: RankGroup) -> None:
        """``stack``: this rank's part."""
        super().__init__(stack, holder)
        self._ranks = group

    def forward(
        self, hidden: Tensor, chosen: Tensor, weights: Tensor, *, rows_per_token: int = 1
    ) -> Tensor:
        hidden = add_up_gradients(hidden, self._ranks)
        weights = add_up_gradients(weights, self._ranks)
        if self._ranks.splits_experts:
            # A pair whose expert is elsewhere goes to one that is here, and counts nothing.
            num_here = self.stack.num_experts
            is_elsewhere = chosen.div(num_here, rounding_mode="floor") != self._ranks.rank
            chosen = chosen % num_here
            weights = weights.masked_fill(is_elsewhere, 0.0)
        output = super().forward(hidden, chosen, weights, rows_per_token=rows_per_token)
        return add_up_outputs(output, self._ranks)
