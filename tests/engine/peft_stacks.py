"""The experts of an adapter in stock peft, which adapts their stacked parameters.

Written from peft's ``ParamWrapper`` and transformers' modules, not from the engine's export: it
finds by itself which outputs of a parameter are the gate's, and how the parameter is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from training.engine.torch.adapters import AdapterLayout

GATE_UP = ("gate_proj", "up_proj")
EXPERTS_LAYERS = (*GATE_UP, "down_proj", "w1", "w2", "w3")


class PeftStacks:
    """The layers of a layout that are experts', in the model before and after peft wrapped it."""

    def __init__(self, base: nn.Module, layout: AdapterLayout) -> None:
        self._layout = layout
        self._parameters: dict[str, list[str]] = {}
        """By parameter, the layers in it in order."""
        self._stored_inputs_first: dict[str, bool] = {}
        self._columns: dict[str, slice] = {}
        for name, place in layout.places.items():
            if place.shape.num_experts:
                stack, _, layer = name.rpartition(".")
                self._find(base, stack, layer)

    def _find(self, base: nn.Module, stack: str, layer: str) -> None:
        module = base.get_submodule(stack)
        is_joined = layer in GATE_UP and hasattr(module, "gate_up_proj")
        parameter = f"{stack}.{'gate_up_proj' if is_joined else layer}"
        self._parameters.setdefault(parameter, []).append(f"{stack}.{layer}")
        inputs_first = isinstance(module, Llama4TextExperts) or getattr(
            module, "is_transposed", False
        )
        self._stored_inputs_first[parameter] = inputs_first
        num_outputs = base.get_parameter(parameter).shape[2 if inputs_first else 1]
        half = num_outputs // 2
        first = layer == "gate_proj"
        if not is_joined:
            columns = slice(None)
        elif getattr(module, "is_concatenated", True):
            columns = slice(0, half) if first else slice(half, None)
        else:
            columns = slice(0 if first else 1, None, 2)
        self._columns[f"{stack}.{layer}"] = columns

    def are_named(self, name: str) -> bool:
        """Whether peft may take the linear layer ``name`` for experts. As a parameter it is not."""
        return bool(self._parameters) and name.rpartition(".")[2] in EXPERTS_LAYERS

    def peft_arguments(self, others: Iterable[str]) -> dict[str, Any]:
        """``others``: linear layers to adapt as parameters."""
        if not self._parameters:
            return {}
        layout = self._layout
        return {
            "target_parameters": [*self._parameters, *(f"{name}.weight" for name in others)],
            "rank_pattern": {p: layout.rank * len(n) for p, n in self._parameters.items()},
            "alpha_pattern": {p: layout.config.alpha * len(n) for p, n in self._parameters.items()},
        }

    def set_weights(self, model: nn.Module, flat: Tensor) -> None:
        with torch.no_grad():
            for parameter in self._parameters:
                wrapper = self._wrapper(model, parameter)
                for which in "AB":
                    getattr(wrapper, f"lora_{which}")["default"].weight.zero_()
            for name, a_of_peft, b_of_peft in self._views(model, gradients=False):
                a, b = self._layout.pair(flat, name)
                a_of_peft.copy_(a.expand_as(a_of_peft))
                b_of_peft.copy_(b.expand_as(b_of_peft))

    def read_grads(self, model: nn.Module, flat: Tensor) -> None:
        """Copy them into ``flat``; a matrix that all experts share gets the sum of theirs."""
        for name, *of_peft in self._views(model, gradients=True):
            for ours, theirs in zip(self._layout.pair(flat, name), of_peft, strict=True):
                ours.copy_(theirs.sum(0) if ours.ndim == 2 else theirs)

    def _views(self, model: nn.Module, *, gradients: bool) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each layer, with views of its A (E, R, in) and B (E, out, R) in peft's parameters."""
        rank = self._layout.rank
        for parameter, names in self._parameters.items():
            wrapper = self._wrapper(model, parameter)
            weights = [getattr(wrapper, f"lora_{which}")["default"].weight for which in "AB"]
            flat_a, flat_b = (
                weight.grad if gradients and weight.grad is not None else weight.data * 0
                for weight in weights
            ) if gradients else (weight.data for weight in weights)  # fmt: skip
            experts = wrapper.num_experts
            a = flat_a.view(experts, -1, flat_a.shape[1])
            b = flat_b.view(flat_b.shape[0], -1, experts).permute(2, 0, 1)
            knows_storage = hasattr(wrapper.get_base_layer(), "is_transposed")
            if self._stored_inputs_first[parameter] and not knows_storage:
                a, b = b.transpose(1, 2), a.transpose(1, 2)
            for i, name in enumerate(names):
                ranks = slice(i * rank, (i + 1) * rank)
                yield name, a[:, ranks], b[:, self._columns[name], ranks]

    @staticmethod
    def _wrapper(model: nn.Module, parameter: str) -> ParamWrapper:
        stack, _, short = parameter.rpartition(".")
        module = model.base_model.model.get_submodule(stack)
        while module.parameter_name != short:
            module = module.base_layer
        return module
