"""Finds a model's stacks of experts and describes them.

transformers holds the experts of a layer in one module with a three-dimensional parameter for each
projection, of all experts: ``gate_up_proj`` or ``up_proj``, and ``down_proj``. An expert's MLP is
linear layers all the same, and adapters see them so: ``gate_proj``, ``up_proj`` and ``down_proj``
below the module's name, each with matrices per expert. Gate and up have a pair each, although they
share a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from training.engine.torch.adapters import LoraShape

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"

_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
"""Set by transformers on every module whose experts may be computed by another implementation."""


@dataclass(frozen=True, kw_only=True)
class ExpertPart:
    """The part of a stack's layer that is in this process."""

    experts: slice | None = None
    inputs: slice | None = None
    outputs: slice | None = None
    """None: all of them."""

    def of(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Views of A (E, R, in) and B (E, out, R); a matrix that all experts share has no E."""
        if self.experts is not None:
            a = a[self.experts] if a.ndim == 3 else a
            b = b[self.experts] if b.ndim == 3 else b
        if self.inputs is not None:
            a = a[..., self.inputs]
        if self.outputs is not None:
            b = b[..., self.outputs, :]
        return a, b


@dataclass(frozen=True, kw_only=True)
class ExpertLinear:
    """One linear layer of every expert of a stack, as adapters see it."""

    name: str
    """Its dotted name in the base model, which keys adapter layouts."""
    columns: slice
    """Its outputs among those of the parameter that holds it."""
    shape: LoraShape
    part: ExpertPart | None = None
    """None: the whole layer."""

    def own(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Views of those parts of an adapter's A and B that belong to what is in this process."""
        return (a, b) if self.part is None else self.part.of(a, b)


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """A parameter of all experts of a stack, and the linear layers in it."""

    parameter_name: str
    module: nn.Module
    is_transposed: bool
    """Whether the parameter is (E, in, out) and not (E, out, in), as linear layers have it."""
    layers: tuple[ExpertLinear, ...]

    @property
    def num_outputs(self) -> int:
        """Of the whole parameter, also if a part of it is in this process."""
        return sum(layer.shape.out_features for layer in self.layers)

    @property
    def matrices(self) -> Tensor:
        """(E, in, out), a view of what is in this process."""
        parameter: Tensor = getattr(self.module, self.parameter_name)
        return parameter if self.is_transposed else parameter.transpose(1, 2)

    @property
    def bias(self) -> Tensor | None:
        """(E, out)"""
        return getattr(self.module, f"{self.parameter_name}_bias", None)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertStack:
    """The experts of one layer."""

    name: str
    """The dotted name of ``module`` in the base model."""
    module: nn.Module
    activate: Callable[[Tensor], Tensor]
    """The inputs (n, I) of the projection back, from the outputs of the one before it."""
    num_experts: int
    up: Projection
    """From the hidden states; with a gate, of both halves of a gated unit."""
    down: Projection
    """Back to the hidden states."""

    @property
    def layers(self) -> tuple[ExpertLinear, ...]:
        return (*self.up.layers, *self.down.layers)


def find_stacks(model: nn.Module) -> dict[str, ExpertStack]:
    """The stacks that adapters can be attached to, by name."""
    found = {name: _stack(name, module) for name, module in model.named_modules()}
    return {name: stack for name, stack in found.items() if stack is not None}


def _stack(name: str, module: nn.Module) -> ExpertStack | None:
    """A description of ``module``, or None if it is not experts as transformers stacks them."""
    if isinstance(module, Llama4TextExperts):  # it does not say how it stores its matrices
        return _describe(name, module, is_transposed=True)
    if not all(hasattr(module, attribute) for attribute in _ATTRIBUTES):
        return None
    up = "gate_up_proj" if module.has_gate else UP
    known = {up, DOWN, f"{up}_bias", f"{DOWN}_bias"}
    parameters = dict(module.named_parameters())
    has_others = bool(set(parameters) - known) or getattr(module, "has_post_expert_norm", False)
    if has_others or not {up, DOWN} <= set(parameters):
        return None
    if any(parameters[projection].ndim != 3 for projection in (up, DOWN)):
        return None
    return _describe(name, module, is_transposed=bool(module.is_transposed))


def _describe(name: str, module: nn.Module, *, is_transposed: bool) -> ExpertStack:
    """Describe a module that has a parameter ``gate_up_proj`` or ``up_proj``, and ``down_proj``."""
    has_gate = hasattr(module, "gate_up_proj")
    up_name = "gate_up_proj" if has_gate else UP
    num_experts, hidden, outputs = _sizes(module.get_parameter(up_name), is_transposed)
    _, inner, _ = _sizes(module.get_parameter(DOWN), is_transposed)
    if not has_gate:
        columns = {UP: slice(0, outputs)}
    elif getattr(module, "is_concatenated", True):
        columns = {GATE: slice(0, inner), UP: slice(inner, outputs)}
    else:
        columns = {GATE: slice(0, outputs, 2), UP: slice(1, outputs, 2)}
    # The side of the hidden states may be shared by all experts: A of gate and up, B of down.
    outer = LoraShape(hidden, inner, num_experts, "A")
    return ExpertStack(
        name=name,
        module=module,
        activate=_activation_of(module),
        num_experts=num_experts,
        up=Projection(
            parameter_name=up_name,
            module=module,
            is_transposed=is_transposed,
            layers=tuple(
                ExpertLinear(name=f"{name}.{layer}", columns=own, shape=outer)
                for layer, own in columns.items()
            ),
        ),
        down=Projection(
            parameter_name=DOWN,
            module=module,
            is_transposed=is_transposed,
            layers=(
                ExpertLinear(
                    name=f"{name}.{DOWN}",
                    columns=slice(0, hidden),
                    shape=LoraShape(inner, hidden, num_experts, "B"),
                ),
            ),
        ),
    )


def _activation_of(module: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(module, Llama4TextExperts):
        return partial(_default_apply_gate, module)  # not written as a function there
    function: Callable[[Tensor], Tensor]
    function = module._apply_gate if hasattr(module, "gate_up_proj") else module.act_fn
    return function


def _sizes(parameter: Tensor, is_transposed: bool) -> tuple[int, int, int]:
    """Experts, inputs and outputs."""
    num_experts, first, second = parameter.shape
    return (num_experts, first, second) if is_transposed else (num_experts, second, first)
