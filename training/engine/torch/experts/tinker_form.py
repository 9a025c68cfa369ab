"""An adapter's matrices as the hosted service stores them, for tools that merge its adapters.

Gate, up and down of all experts of a layer are ``w1``, ``w3`` and ``w2`` below the stack's name,
three-dimensional, the first dimension 1 where all experts share a matrix. Without a gate ``w1`` is
up. Other layers are stored as peft stores them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from training.engine.torch.adapters import AdapterLayout
from training.engine.torch.experts.stacks import DOWN, GATE, UP, ExpertStack


def tinker_experts(
    layout: AdapterLayout, flat: Tensor, stacks: Mapping[str, ExpertStack]
) -> dict[str, Tensor]:
    """The experts' matrices in ``flat`` (P,) by their names in the file."""
    tensors = {}
    for stack in stacks.values():
        has_gate = any(layer.name.endswith(GATE) for layer in stack.layers)
        names = {GATE: "w1", UP: "w3" if has_gate else "w1", DOWN: "w2"}
        for layer in stack.layers:
            if layer.name not in layout.places:
                continue
            prefix = f"base_model.model.{stack.name}.{names[layer.name.rpartition('.')[2]]}"
            for side, matrix in zip("AB", layout.pair(flat, layer.name), strict=True):
                stacked = matrix[None] if matrix.ndim == 2 else matrix
                tensors[f"{prefix}.lora_{side}.weight"] = stacked.contiguous()
    return tensors
