"""The three roles of one base model together."""

from __future__ import annotations

from dataclasses import dataclass

from training.engine.interface.renderer import Renderer
from training.engine.interface.sampler import Sampler
from training.engine.interface.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A worker's three roles. Each part of the worker takes the role that it needs."""

    trainer: Trainer
    sampler: Sampler
    renderer: Renderer
    adapter_bytes: int
    """Memory budget of the adapters and of the sampler's versions of weights in this process."""
