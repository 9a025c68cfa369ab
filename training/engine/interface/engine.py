"""The three roles of one base model together."""

from __future__ import annotations

from dataclasses import dataclass

from training.engine.interface.renderer import Renderer
from training.engine.interface.sampler import Sampler
from training.engine.interface.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Engine:
    """All that a worker has of its base model. Each part of the worker takes the role it needs."""

    trainer: Trainer
    sampler: Sampler
    renderer: Renderer
    adapter_bytes: int
    """What adapters, and versions of weights that the sampler keeps here, may take together."""
