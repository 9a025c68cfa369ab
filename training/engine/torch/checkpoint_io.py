"""An adapter as files of our own: a checkpoint, complete or absent.

A checkpoint directory holds one safetensors file per buffer, so that loading the weights alone
reads nothing else, and ``meta.json``: the adapter's shape, the place of each module's matrices,
the step, the versions that made it, and a SHA-256 of every file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from training.atomic_directory import new_directory, read_meta, write_meta
from training.engine.interface import CapturedAdapter
from training.engine.torch.adapters import (
    Adapter,
    AdapterLayout,
    AdapterTensors,
    LoraShape,
)
from training.errors import CheckpointNotFound, InvalidRequest
from training.types import LoraConfig

FORMAT = 1
LIBRARIES = ("torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True, kw_only=True, eq=False)
class CapturedTensors(CapturedAdapter):
    """An adapter's buffers, in the host's memory; weights alone stay on their device.

    On a CPU nothing is copied: passes and steps replace buffers and modify none of them.
    """

    weights: AdapterTensors
    """On the device, for a sampler that shares it."""
    buffers: Mapping[str, Tensor]
    """(P,) float32 each, by the name of its file: the inputs of the next step, or the weights
    alone."""
    step: int
    base_model_name: str

    @property
    def num_bytes(self) -> int:
        return sum(flat.nbytes for flat in self.buffers.values())

    def write(self, directory: Path) -> int:
        layout = self.weights.layout
        places = layout.places.items()
        meta = {
            "format": FORMAT,
            "base_model": self.base_model_name,
            "step": self.step,
            "config": _config_values(layout),
            "modules": {name: _shape_values(place.shape) for name, place in places},
            "versions": _library_versions(),
        }
        with new_directory(directory) as temporary:
            for name, flat in self.buffers.items():
                write_tensors(temporary / f"{name}.safetensors", {name: flat})
            return write_meta(temporary, meta)


def capture_adapter(
    adapter: Adapter, *, base_model_name: str, with_optimizer: bool = True
) -> CapturedTensors:
    """All inputs of the next step; see ``Trainer.capture_adapter``.

    A gradient of zeros, as after every optimizer step, is left out.
    """
    buffers = {"weights": adapter.weights.flat}
    if with_optimizer:
        buffers |= {"exp_avg": adapter.exp_avg, "exp_avg_sq": adapter.exp_avg_sq}
        if adapter.grad.flat.any():
            buffers["grad"] = adapter.grad.flat
    return CapturedTensors(
        weights=adapter.weights,
        buffers={n: flat.cpu() if with_optimizer else flat for n, flat in buffers.items()},
        step=adapter.step,
        base_model_name=base_model_name,
    )


@cache
def _library_versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def load_adapter(
    directory: Path,
    shapes: Mapping[str, LoraShape],
    device: torch.device,
    *,
    with_optimizer: bool = True,
) -> Adapter:
    """The adapter in a directory; see ``Trainer.load_adapter``.

    Args:
        shapes: Every module of the base model that can have an adapter.

    Raises:
        CheckpointNotFound: No such directory, it is damaged, or it has only weights and the
            optimizer was requested.
        InvalidRequest: It was made for a base model of another shape.
    """
    meta, weights = _read_weights(directory, shapes, device, with_optimizer=with_optimizer)
    moments = ["exp_avg", "exp_avg_sq"] if with_optimizer else []
    has_grad = with_optimizer and "grad.safetensors" in meta["sha256"]
    buffers = {
        name: _read(directory, name, device) for name in [*moments, *(["grad"] if has_grad else [])]
    }
    for name in ("exp_avg", "exp_avg_sq", "grad"):
        if name not in buffers:
            buffers[name] = torch.zeros_like(weights.flat)
    return Adapter(
        layout=weights.layout,
        weights=weights,
        grad=AdapterTensors(weights.layout, buffers["grad"]),
        exp_avg=buffers["exp_avg"],
        exp_avg_sq=buffers["exp_avg_sq"],
        step=meta["step"] if with_optimizer else 0,
    )


def load_weights(
    directory: Path, shapes: Mapping[str, LoraShape], device: torch.device
) -> AdapterTensors:
    """Only the weights in a directory, for sampling.

    Raises:
        CheckpointNotFound: No such directory, or it is damaged.
        InvalidRequest: It was made for a base model of another shape.
    """
    return _read_weights(directory, shapes, device, with_optimizer=False)[1]


def _read_weights(
    directory: Path, shapes: Mapping[str, LoraShape], device: torch.device, *, with_optimizer: bool
) -> tuple[dict[str, Any], AdapterTensors]:
    """``meta.json`` and the weights of a checkpoint that fits the base model."""
    meta = read_meta(directory)
    if meta.get("format") != FORMAT:
        raise CheckpointNotFound(f"{directory.name}: format {meta.get('format')} is not known.")
    if with_optimizer and "exp_avg.safetensors" not in meta["sha256"]:
        raise CheckpointNotFound(f"{directory.name} has only weights, no optimizer state.")
    modules = {name: LoraShape(*shape) for name, shape in meta["modules"].items()}
    for name, shape in modules.items():
        known = shapes.get(name)
        if known is None or known.without_sharing() != shape.without_sharing():
            raise InvalidRequest(
                f"{directory.name} was made for {meta['base_model']}, whose {name} this base"
                " model does not have in that shape."
            )
    layout = AdapterLayout(_read_config(meta["config"]), modules)
    return meta, AdapterTensors(layout, _read(directory, "weights", device))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file."""
    # Our own write call: safetensors' own reports a full disk as an error without errno.
    content = save({name: tensor.cpu() for name, tensor in tensors.items()}, {"format": "pt"})
    path.write_bytes(content)


def _read(directory: Path, name: str, device: torch.device) -> Tensor:
    # A copy: the file's bytes are mapped at odd addresses, and float32 kernels sum in an order that
    # depends on alignment, so a loaded run would differ from an undisturbed one in the last bits.
    return load_file(directory / f"{name}.safetensors", device=str(device))[name].clone()


def _config_values(layout: AdapterLayout) -> dict[str, Any]:
    """The config, without what only concerns experts where there are none."""
    values = asdict(layout.config)
    if not layout.has_experts:
        del values["share_across_experts"]
    return values


def _shape_values(shape: LoraShape) -> list[int | str]:
    """The arguments of ``LoraShape``: two for one layer, four for one of every expert."""
    values: list[int | str] = [shape.in_features, shape.out_features]
    return [*values, shape.num_experts, shape.shared] if shape.num_experts else values


def _read_config(values: Mapping[str, Any]) -> LoraConfig:
    target_modules = values["target_modules"]
    return LoraConfig(
        **{**values, "target_modules": None if target_modules is None else tuple(target_modules)}
    )
