"""Temporarily reduces a model to one layer of each kind: as good for the check, and far cheaper.

Rounding in bfloat16 hides errors of less than a few tenths of a nat, so its numbers become
float32 meanwhile, if they are not too many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

FEWEST_LAYERS = 2

MAX_FLOAT32_BYTES = 2**30
"""Memory limit of the float32 copy of the few layers, embeddings and head."""

_NUMBERED = ("layer_idx", "layer_id", "layer_number")
"""Attributes that differ between layers of the same kind."""


class FewLayers:
    """The layers that represent all layers of a model. Found once, before any is replaced."""

    def __init__(self, model: PreTrainedModel, *, may_widen: bool = True) -> None:
        """``may_widen``: whether they may compute in float32 if the model's type is narrower."""
        self.model = model
        self._may_widen = may_widen
        self._found = _find_layers(model)
        if self._found is None:
            self.num_layers = model.config.get_text_config().num_hidden_layers
            return
        _, _, layers = self._found
        kinds: dict[Any, nn.Module] = {}
        for layer in layers:
            kinds.setdefault(_kind(layer), layer)
        first = list(layers)[:FEWEST_LAYERS]
        chosen = [i for i, x in enumerate(layers) if x in first or x in kinds.values()]
        self._types = _types_of(model, layers)
        if self._types is not None and not _can_set_types(model):
            chosen = list(range(chosen[-1] + 1))
        self._chosen = [layers[i] for i in _with_room(chosen, self._types)]
        self.num_layers = len(self._chosen)
        """The number of remaining layers; all of them if the layers cannot be found in the
        model."""

    @contextmanager
    def alone(self, *, in_float32: bool = True) -> Iterator[None]:
        """Inside, the model has no other layers, and float32 weights if they fit and are
        wanted."""
        with ExitStack() as stack:
            if self._found is not None:
                parent, name, layers = self._found
                setattr(parent, name, nn.ModuleList(self._chosen))
                stack.callback(setattr, parent, name, layers)
                stack.enter_context(self._types_of_chosen(layers))
            if in_float32 and self._may_widen:
                stack.enter_context(_float32(self.model))
            yield

    @contextmanager
    def _types_of_chosen(self, layers: nn.ModuleList) -> Iterator[None]:
        """Decoders look up a layer's mask and rotary factors by its index in the list."""
        config = self.model.config.get_text_config()
        types = self._types
        if types is None:
            yield
            return
        chosen = [kind for kind, x in zip(types, layers, strict=True) if x in self._chosen]
        rearranged = [*chosen, *types[len(chosen) :]]
        if rearranged == types:
            yield
            return
        config.layer_types = rearranged
        try:
            yield
        finally:
            config.layer_types = types


def _types_of(model: PreTrainedModel, layers: nn.ModuleList) -> list[str] | None:
    """The type of each layer by the configuration; None if it does not say."""
    types = getattr(model.config.get_text_config(), "layer_types", None)
    return list(types) if types and len(types) == len(layers) else None


def _can_set_types(model: PreTrainedModel) -> bool:
    """Whether the types are stored; some configurations compute them from other settings."""
    config = type(model.config.get_text_config())
    stored = getattr(config, config.attribute_map.get("layer_types", "layer_types"), None)
    return not isinstance(stored, property) or stored.fset is not None


def _with_room(chosen: list[int], types: list[str] | None) -> list[int]:
    """The chosen layers, and more if their places among them would belie their types.

    A layer finds its mask by its place among the remaining layers, and its cache by its own
    number; both have the type that the configuration says for that index.
    """
    if types is None:
        return chosen
    wrong = [
        number
        for place, number in enumerate(chosen)
        if place != number and number < len(chosen) and types[chosen[number]] != types[number]
    ]
    if not wrong:
        return chosen
    missing = min(set(range(wrong[0])) - set(chosen))
    return _with_room(sorted([*chosen, missing]), types)


@contextmanager
def _float32(model: nn.Module) -> Iterator[None]:
    """Convert the parameters to float32, unless that takes too much memory."""
    narrow = [p for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    if 4 * sum(p.numel() for p in narrow) > MAX_FLOAT32_BYTES:
        yield
        return
    kept = [(parameter, parameter.data) for parameter in narrow]
    try:
        for parameter, numbers in kept:
            parameter.data = numbers.float()
        yield
    finally:
        for parameter, numbers in kept:
            parameter.data = numbers


def _find_layers(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """The parent module, attribute name and list of the decoder's layers; None if there is no such
    list."""
    number = model.config.get_text_config().num_hidden_layers
    for parent in model.get_decoder().modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == number:
                return parent, name, child
    return None


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Equal for layers that differ only in the values of their weights: the classes,
    shapes and plain settings of all their parts."""
    parts: list[Any] = []
    for name, module in layer.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str | None) and key not in _NUMBERED
        }
        shapes = [(key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)]
        parts.append((name, type(module), tuple(sorted(settings.items())), tuple(shapes)))
    return tuple(parts)
