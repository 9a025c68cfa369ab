"""An adapter's experts as stock peft stores them: ``target_parameters``.

peft adapts the stacked parameter itself. Gate and up share one, so there their two pairs become one
pair of twice the rank: the As one after the other, and each B at its own outputs, zeros elsewhere.
A matrix that all experts share is repeated for each. The results are the same; the files are
larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from training.engine.torch.adapters import AdapterLayout
from training.engine.torch.experts.stacks import ExpertStack, Projection

RENAMED_BY_PEFT = ("laguna",)
"""Families whose adapters on shared experts stock peft loads under names that do not exist, so that
they would be missing from an export without an error."""


@dataclass(kw_only=True, eq=False)
class PeftExperts:
    """What the experts add to an export."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By their names in the file."""
    target_parameters: list[str] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    """``rank_pattern``: of the parameters whose rank is not the adapter's."""
    alphas: dict[str, float] = field(default_factory=dict)
    """``alpha_pattern``, for the same scale."""


def peft_experts(
    layout: AdapterLayout, flat: Tensor, stacks: Mapping[str, ExpertStack]
) -> PeftExperts:
    """The matrices in ``flat`` (P,) of all layers of ``stacks`` that the layout has."""
    result = PeftExperts()
    for stack in stacks.values():
        projections = projections_in(layout, stack)
        for depth, projection in enumerate(reversed(projections)):
            _add(result, layout, flat, stack, projection, depth)
    return result


def projections_in(layout: AdapterLayout, stack: ExpertStack) -> list[Projection]:
    """Those with an adapter, in the order in which peft wraps them: the first is innermost."""
    order = [name for name, _ in stack.module.named_parameters(recurse=False)]
    adapted = [
        projection
        for projection in (stack.up, stack.down)
        if any(layer.name in layout.places for layer in projection.layers)
    ]
    return sorted(adapted, key=lambda projection: order.index(projection.parameter_name))


def _add(
    result: PeftExperts,
    layout: AdapterLayout,
    flat: Tensor,
    stack: ExpertStack,
    projection: Projection,
    depth: int,
) -> None:
    """Args: depth: how many of peft's wrappers are around the parameter's own."""
    a, b = _joined(layout, flat, projection)
    if peft_exchanges(projection):
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    rank = a.shape[1]
    name = f"{stack.name}.{projection.parameter_name}"
    result.target_parameters.append(name)
    if rank != layout.rank:
        result.ranks[name] = rank
        result.alphas[name] = layout.config.alpha * (rank // layout.rank)
    wrapper = f"base_model.model.{stack.name}{'.base_layer' * depth}"
    result.tensors[f"{wrapper}.lora_A.weight"] = a.flatten(0, 1).contiguous()  # (E * R, in)
    b = b.permute(1, 2, 0).flatten(1)  # (out, R * E)
    result.tensors[f"{wrapper}.lora_B.weight"] = b.contiguous()


def peft_exchanges(projection: Projection) -> bool:
    """Whether peft takes the parameter's inputs for its outputs: of a module that does not say how
    it stores its matrices it assumes (E, out, in). Then its A is our B transposed."""
    return bool(getattr(projection.module, "is_transposed", False)) != projection.is_transposed


def _joined(layout: AdapterLayout, flat: Tensor, projection: Projection) -> tuple[Tensor, Tensor]:
    """A (E, R, in) and B (E, out, R) of the whole parameter."""
    layers = [layer for layer in projection.layers if layer.name in layout.places]
    num_experts = projection.layers[0].shape.num_experts
    num_outputs = projection.num_outputs
    all_a = []
    all_b = flat.new_zeros(num_experts, num_outputs, layout.rank * len(layers))
    for i, layer in enumerate(layers):
        a, b = layout.pair(flat, layer.name)
        all_a.append(a.expand(num_experts, *a.shape[-2:]))
        all_b[:, layer.columns, i * layout.rank : (i + 1) * layout.rank] = b
    return torch.cat(all_a, dim=1), all_b
