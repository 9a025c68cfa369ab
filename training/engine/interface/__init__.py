"""The contract between the worker and an engine: three roles, plain values, no Django.

trainer
    The adapters of one frozen base model: passes over data, optimizer steps, their files.
sampler
    Sequences that continue prompts.
renderer
    Conversations and text to tokens, and back.

There are two kinds of errors. A domain error (``training.errors.TrainingError``) means that one
request was refused and that the adapter is exactly as before. Any other exception
means that memory may be corrupt: the worker must discard the engine and rebuild its adapters
from their logs.
"""

from __future__ import annotations

from training.engine.interface.engine import Engine
from training.engine.interface.renderer import Renderer
from training.engine.interface.sampler import SampleJob, SampleOutput, Sampler
from training.engine.interface.trainer import ForwardBackwardJob, Trainer
from training.engine.interface.values import BaseModelInfo, CapturedAdapter

__all__ = [
    "BaseModelInfo",
    "CapturedAdapter",
    "Engine",
    "ForwardBackwardJob",
    "Renderer",
    "SampleJob",
    "SampleOutput",
    "Sampler",
    "Trainer",
]
