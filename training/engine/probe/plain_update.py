"""A LoRA update of the unmodified model by plain autograd, for the check at the start.

One linear layer of each name gets it, and one stack of experts of each name: the update of a linear
layer is a term of its output, that of experts is added to their weights, as peft does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from training.engine.probe.called_layers import general_name
from training.engine.torch.adapters import AdapterLayout, AdapterTensors, LoraShape
from training.engine.torch.experts.routers import find_routers
from training.engine.torch.experts.stacks import ExpertStack, Projection, find_stacks
from training.engine.torch.target_modules import can_have_adapter
from training.types import LoraConfig

LORA = LoraConfig(rank=8, alpha=8.0)
LORA_WEIGHT = 0.02
"""Standard deviation of the update's A and B: large enough to be seen, small enough to change
little."""

Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainUpdate:
    """The update, and the parts of the model that have it. ``draw_update`` makes it."""

    weights: AdapterTensors
    linears: Mapping[str, nn.Linear]
    stacks: Mapping[str, ExpertStack]

    @contextmanager
    def applied(self, flat: Tensor) -> Iterator[None]:
        """Inside, the model computes with the update in ``flat`` (P,), which may need a
        gradient."""
        layout = self.weights.layout
        with ExitStack() as stack:
            for name, module in self.linears.items():
                hook = _linear_term(layout, flat, name)
                stack.callback(module.register_forward_hook(hook).remove)
            for experts in self.stacks.values():
                stack.enter_context(_updated_experts(layout, flat, experts))
            yield


def draw_update(model: PreTrainedModel) -> PlainUpdate:
    """A random update of the first linear layer, and the first stack of experts, of each name,
    numbers aside: ``layers.0.mlp.up_proj`` and so on."""
    stacks = find_stacks(model)
    routers = find_routers(model, stacks)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    in_decoder = {id(module) for module in decoder.modules() if module is not head}
    model_type = model.config.get_text_config().model_type
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name not in routers
        and id(module) in in_decoder
        and can_have_adapter(name, model_type)
    }
    linears = _first_of_each_name(linears.items())
    stacks = _first_of_each_name(stacks.items())
    shapes = {n: LoraShape(m.in_features, m.out_features) for n, m in linears.items()}
    for stack in stacks.values():
        shapes |= {layer.name: layer.shape for layer in stack.layers}
    layout = AdapterLayout(LORA, shapes)
    flat = torch.randn(layout.num_parameters, generator=torch.Generator().manual_seed(1))
    weights = AdapterTensors(layout, (flat * LORA_WEIGHT).to(model.device))
    return PlainUpdate(weights=weights, linears=linears, stacks=stacks)


def _first_of_each_name(parts: Iterable[tuple[str, Part]]) -> dict[str, Part]:
    first: dict[str, tuple[str, Part]] = {}
    for name, part in parts:
        first.setdefault(general_name(name), (name, part))
    return dict(first.values())


def _linear_term(
    layout: AdapterLayout, flat: Tensor, name: str
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook that adds the update as a plain term, in the layer's dtype."""

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        a, b = (matrix.to(output.dtype) for matrix in layout.pair(flat, name))
        return output + layout.scale * linear(linear(args[0], a), b)

    return add


@contextmanager
def _updated_experts(layout: AdapterLayout, flat: Tensor, stack: ExpertStack) -> Iterator[None]:
    """Inside, every pass of the stack finds updated weights in the place of its parameters."""
    module = stack.module

    def replace(module: nn.Module, args: Any) -> None:
        for projection in (stack.up, stack.down):
            shadow = _updated(layout, flat, projection)
            module.__dict__[projection.parameter_name] = shadow

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        for projection in (stack.up, stack.down):
            module.__dict__.pop(projection.parameter_name, None)

    before = module.register_forward_pre_hook(replace)
    after = module.register_forward_hook(restore, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _updated(layout: AdapterLayout, flat: Tensor, projection: Projection) -> Tensor:
    """The parameter with the update of its layers."""
    matrices = projection.matrices  # (E, in, out)
    update = torch.zeros_like(matrices)
    for layer in projection.layers:
        a, b = (matrix.to(matrices.dtype) for matrix in layout.pair(flat, layer.name))
        update[:, :, layer.columns] = layout.scale * (a.transpose(-1, -2) @ b.transpose(-1, -2))
    updated = matrices + update
    return updated if projection.is_transposed else updated.transpose(1, 2)
