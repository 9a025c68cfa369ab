"""What an operator says of one base model, as plain values: no Django, no torch."""

from __future__ import annotations

from dataclasses import dataclass

LAYOUTS = ("auto", "packed")
DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class BaseModelConfig:
    """One ``[[base_model]]`` table of the configuration file."""

    name: str
    """What clients call it."""
    path: str
    """A folder, or a name on the model hub."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``. ``auto`` and ``cuda`` spread several base models
    over the GPUs that are there."""
    dtype: str = "auto"
    """Of the frozen weights: ``auto`` is bfloat16 where the device computes it natively."""
    layout: str = "auto"
    """How sequences lie in a pass: ``packed`` side by side without padding; ``auto`` chooses."""
    cache_bytes: int = 0
    """What the adapters in its worker's memory may take together; 0: a share of what is free."""


def is_folder(path: str) -> bool:
    """Whether a path is one of the file system; otherwise it is a name on the model hub."""
    return path.startswith((".", "/", "~"))
