"""An adapter in memory: one flat fp32 buffer per quantity, cut into LoRA matrices by a layout.

One buffer each for weights, gradient and the two Adam moments makes a snapshot one write, an
optimizer step one vectorised update, and an adapter's gradient its own. The weights are
immutable once published: ``optim_step`` builds a new buffer and swaps the handle, so a user that
took ``adapter.weights`` before (a sampling job) keeps the old weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from training.types import LoraConfig

NUM_BUFFERS = 4
"""Weights, gradient, and the two Adam moments."""


@dataclass(frozen=True)
class LoraShape:
    """The linear layer that one pair of LoRA matrices is attached to, or that layer of every
    expert of a stack."""

    in_features: int
    out_features: int
    num_experts: int = 0
    """The experts of a stack, each with matrices of its own; 0 is one layer alone."""
    shared: Literal["", "A", "B"] = ""
    """Which of the two matrices all experts share."""

    @property
    def a_size(self) -> tuple[int, ...]:
        """The shape of A without its rank: (E, in) or (in,)."""
        experts = self.num_experts and self.shared != "A"
        return (self.num_experts, self.in_features) if experts else (self.in_features,)

    @property
    def b_size(self) -> tuple[int, ...]:
        """The shape of B without its rank: (E, out) or (out,)."""
        experts = self.num_experts and self.shared != "B"
        return (self.num_experts, self.out_features) if experts else (self.out_features,)

    def without_sharing(self) -> LoraShape:
        """Each expert with its own two matrices."""
        return replace(self, shared="")


@dataclass(frozen=True)
class _Cut:
    """The place of a matrix, or of a stack of them, in the flat buffer."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def at(cls, offset: int, shape: tuple[int, ...]) -> _Cut:
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return cls(offset, shape, tuple(strides))

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        """A view of ``flat`` (P,); of a pass's gradient all are made anew, so in one operation."""
        return flat.as_strided(self.shape, self.strides, flat.storage_offset() + self.offset)


@dataclass(frozen=True)
class LoraPlace:
    """The place of a module's pair in the flat buffer: A (R, in), then B (out, R).

    In a stack A is (E, R, in) and B (E, out, R), but for the one that is shared.
    """

    a: _Cut
    b: _Cut
    shape: LoraShape


class AdapterLayout:
    """The modules of an adapter, and the places of their matrices in its flat buffers."""

    def __init__(self, config: LoraConfig, shapes: Mapping[str, LoraShape]) -> None:
        """``shapes``: module name -> its linear layer, in the base model's own order."""
        self.config = config
        self.rank = config.rank
        self.scale = config.alpha / config.rank
        self.places: dict[str, LoraPlace] = {}
        offset = 0
        for name, shape in shapes.items():
            *experts, features = shape.a_size
            a = _Cut.at(offset, (*experts, self.rank, features))
            b = _Cut.at(a.end, (*shape.b_size, self.rank))
            self.places[name] = LoraPlace(a, b, shape)
            offset = b.end
        self.num_parameters = offset
        self.has_experts = any(shape.num_experts for shape in shapes.values())

    def num_bytes(self, dtype: torch.dtype, *, with_optimizer: bool = True) -> int:
        """Memory of an adapter of this layout on a base model of this dtype.

        Without ``with_optimizer`` only its weights: in float32, and converted once for the passes.
        """
        converted = 0 if dtype == torch.float32 else dtype.itemsize
        buffers = NUM_BUFFERS if with_optimizer else 1
        return self.num_parameters * (buffers * torch.float32.itemsize + converted)

    def pair(self, flat: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Views of ``flat`` (P,): A (R, in) and B (out, R) of one module; of a stack A
        (E, R, in) and B (E, out, R), but for the one that is shared."""
        place = self.places[name]
        return place.a.of(flat), place.b.of(flat)


class AdapterTensors:
    """One flat buffer seen through its layout: an adapter's weights, or its gradient.

    Weights are a snapshot: they are not modified after they were published.
    """

    def __init__(self, layout: AdapterLayout, flat: Tensor) -> None:
        """``flat``: (P,) float32."""
        self.layout = layout
        self.flat = flat
        self._pairs: dict[torch.dtype, dict[str, tuple[Tensor, Tensor]]] = {}

    def pair(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """A (R, in) and B (out, R) of a module in ``dtype``; None if it has no adapter.

        The first call in a dtype other than float32 converts the whole buffer and keeps it.
        """
        pairs = self._pairs.get(dtype)
        if pairs is None:
            flat = self.flat.to(dtype)
            pairs = {name: self.layout.pair(flat, name) for name in self.layout.places}
            self._pairs[dtype] = pairs
        return pairs.get(name)


@dataclass(kw_only=True, eq=False)
class Adapter:
    """A resident adapter: its current weights, and the inputs of the next optimizer step."""

    layout: AdapterLayout
    weights: AdapterTensors
    """The current weights; replaced, never modified."""
    grad: AdapterTensors
    """Accumulated since the last step; replaced, never modified."""
    exp_avg: Tensor = field(repr=False)
    """(P,) float32, Adam's first moment."""
    exp_avg_sq: Tensor = field(repr=False)
    """(P,) float32, Adam's second moment."""
    step: int = 0
    """Optimizer steps taken."""


def new_adapter(layout: AdapterLayout, device: torch.device) -> Adapter:
    """An adapter without an effect yet: A random per module, B zero, no gradient, step 0."""
    flat = torch.zeros(layout.num_parameters, dtype=torch.float32)
    for name, place in layout.places.items():
        a, _ = layout.pair(flat, name)
        # peft's default, kaiming_uniform_(a=sqrt(5)), is uniform within 1 / sqrt(fan_in).
        bound = 1 / math.sqrt(place.shape.in_features)
        a.uniform_(-bound, bound, generator=_module_generator(layout.config.seed, name))
    weights = flat.to(device)
    return Adapter(
        layout=layout,
        weights=AdapterTensors(layout, weights),
        grad=AdapterTensors(layout, torch.zeros_like(weights)),
        exp_avg=torch.zeros_like(weights),
        exp_avg_sq=torch.zeros_like(weights),
    )


def _module_generator(seed: int, name: str) -> torch.Generator:
    """A separate generator for each (seed, module), so that modules do not affect each other."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def all_finite(*buffers: Tensor) -> bool:
    """Whether every number is finite. Reads each buffer once and allocates none, unlike
    isfinite()."""
    # aminmax() propagates NaN.
    bounds = torch.stack([bound for buffer in buffers for bound in buffer.aminmax()])
    return bool(bounds.isfinite().all())
