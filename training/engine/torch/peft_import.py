"""An adapter that peft trained, as one of ours: the same function, and fresh moments.

Our adapters have one rank and one factor for all modules. A module of a smaller rank gets rows of
zeros, which receive no gradient, so it keeps its rank; a module with another factor gets its B
scaled, so the update is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.engine.torch.adapters import (
    Adapter,
    AdapterLayout,
    AdapterTensors,
    LoraShape,
    all_finite,
)
from training.engine.torch.base_model import BaseModel
from training.engine.torch.experts.peft_import import read_experts, share_equal
from training.engine.torch.target_modules import select_modules, simplest_config
from training.errors import CheckpointNotFound, InvalidRequest
from training.peft_import.files import (
    WEIGHTS_NAME,
    PeftFiles,
    names_parameter,
    read_peft_files,
)
from training.peft_import.patterns import Patterns

GetTensor = Callable[[str], Tensor]


def import_adapter(directory: Path, base_model: BaseModel) -> Adapter:
    """The adapter in a folder in peft's format; see ``Trainer.import_adapter``.

    Raises:
        CheckpointNotFound: No such directory.
        InvalidRequest: It does not fit this base model, or is not finite.
    """
    if not directory.is_dir():
        raise CheckpointNotFound(f"No adapter at {directory.name}.")
    shapes, head_name = base_model.linear_shapes, base_model.head_name
    files = read_peft_files(directory)
    patterns = Patterns(files.config)
    _check_modules(files, patterns, shapes, head_name)
    exact = replace(files.lora_config, target_modules=(*files.ranks, *files.expert_layers))
    layout = AdapterLayout(exact, select_modules(exact, shapes, head_name))
    flat = torch.zeros(layout.num_parameters, dtype=torch.float32)
    try:
        with safe_open(directory / WEIGHTS_NAME, "pt") as file:
            _check_base_copies(files, file.get_tensor, base_model)
            for module in files.ranks:
                _read_pair(layout, flat, module, files, patterns, file.get_tensor)
            read_experts(layout, flat, base_model.expert_stacks, files, patterns, file.get_tensor)
    except SafetensorError as error:
        raise _refusal(f"cannot be read: {error}") from error
    if not all_finite(flat):
        raise _refusal("has numbers that are NaN, infinite or outside float32")
    config = files.lora_config
    if files.experts and (shared := share_equal(layout, flat, shapes)) is not None:
        layout, flat = shared
        config = replace(config, share_across_experts=True)
    layout = AdapterLayout(
        simplest_config(config, shapes, head_name),
        {name: place.shape for name, place in layout.places.items()},
    )
    weights = flat.to(base_model.device)
    return Adapter(
        layout=layout,
        weights=AdapterTensors(layout, weights),
        grad=AdapterTensors(layout, torch.zeros_like(weights)),
        exp_avg=torch.zeros_like(weights),
        exp_avg_sq=torch.zeros_like(weights),
    )


def _check_modules(
    files: PeftFiles, patterns: Patterns, shapes: Mapping[str, LoraShape], head_name: str
) -> None:
    """The matrices are those of the modules that the configuration selects, all of them."""
    for module in files.ranks:
        if module not in shapes:
            raise _refusal(
                f"{module[:200]!r} is no linear layer of this base model, which has for example "
                f"{next(iter(shapes))!r}"
            )
    linears = [name for name, shape in shapes.items() if not shape.num_experts]
    parameters = files.config.target_parameters
    selected = {
        name
        for name in linears
        if patterns.selects(name, is_head=name == head_name)
        or names_parameter(parameters, f"{name}.weight")
    }
    for module in shapes:
        if module in selected and module not in files.ranks:
            raise _refusal(f"lacks the matrices of {module!r}, which target_modules selects")
        if module in files.ranks and module not in selected:
            raise _refusal(
                f"has matrices of {module!r}, which target_modules does not select: peft would "
                "ignore them"
            )


def _check_base_copies(files: PeftFiles, get: GetTensor, base_model: BaseModel) -> None:
    """Weights of the base model that peft saved beside the adapter are those of ours."""
    for tensor, module in files.base_copies.items():
        own = base_model.own_weights(module)
        if own is None:
            raise _refusal(f"tensor {tensor[:200]!r} is no LoRA matrix, and is not read")
        copy = get(tensor).to(own.device)
        narrower = min(copy.dtype, own.dtype, key=lambda dtype: dtype.itemsize)
        if copy.shape != own.shape or not torch.equal(copy.to(narrower), own.to(narrower)):
            raise _refusal(
                f"tensor {tensor[:200]!r} differs from this base model's weights: the adapter was "
                "trained on another base model, or together with its embedding"
            )


def _read_pair(
    layout: AdapterLayout,
    flat: Tensor,
    module: str,
    files: PeftFiles,
    patterns: Patterns,
    get: GetTensor,
) -> None:
    """Write a module's matrices to their place."""
    shape, rank = layout.places[module].shape, files.ranks[module]
    if rank != patterns.rank(module):
        raise _refusal(
            f"{module}.lora_A.weight has rank {rank}, but adapter_config.json says "
            f"{patterns.rank(module)}"
        )
    a, b = layout.pair(flat, module)
    expected = {"A": (rank, shape.in_features), "B": (shape.out_features, rank)}
    parts = {"A": a[:rank], "B": b[:, :rank]}
    for side, part in parts.items():
        name = f"{module}.lora_{side}.weight"
        given = get(f"base_model.model.{name}")
        if given.shape != expected[side]:
            raise _refusal(
                f"{name} has shape {list(given.shape)}; this base model's layer needs "
                f"{list(expected[side])}"
            )
        part.copy_(given)
    factor = files.config.scale(rank, patterns.alpha(module)) / layout.scale
    is_own_factor = rank == files.config.rank == layout.rank and not files.config.alpha_pattern
    if not is_own_factor:
        b.mul_(factor)


def _refusal(why: str) -> InvalidRequest:
    return InvalidRequest(f"{WEIGHTS_NAME}: {why}")
