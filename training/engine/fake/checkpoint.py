"""A fake adapter as a value and as files. Imports numpy and no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.atomic_directory import new_directory, read_meta, write_meta
from training.engine.interface import CapturedAdapter
from training.errors import CheckpointNotFound
from training.types import LoraConfig

FloatArray = NDArray[np.float32]

OPTIMIZER = ("grad", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True, eq=False)
class FakeCapture(CapturedAdapter):
    """Arrays that are never modified: the trainer replaces them."""

    arrays: Mapping[str, FloatArray]
    """``weights`` and, if captured, those of OPTIMIZER."""
    step: int
    config: LoraConfig
    before_write: Callable[[], None]

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def write(self, directory: Path) -> int:
        self.before_write()
        with new_directory(directory) as temporary:
            for name, array in self.arrays.items():
                np.save(temporary / f"{name}.npy", array)
            return write_meta(temporary, {"step": self.step, "config": vars(self.config)})


def read_checkpoint(
    directory: Path, *, with_optimizer: bool
) -> tuple[dict[str, FloatArray], int, LoraConfig]:
    """The arrays, the step and the config in a directory.

    Raises:
        CheckpointNotFound: No such directory, it is damaged, or it has only weights and the
            the optimizer was requested.
    """
    meta: dict[str, Any] = read_meta(directory)
    if with_optimizer and "exp_avg.npy" not in meta["sha256"]:
        raise CheckpointNotFound(f"{directory.name} has only weights, no optimizer state.")
    config = dict(meta["config"])
    if config["target_modules"] is not None:
        config["target_modules"] = tuple(config["target_modules"])
    names = ("weights", *(OPTIMIZER if with_optimizer else ()))
    arrays = {name: np.load(directory / f"{name}.npy") for name in names}
    return arrays, meta["step"], LoraConfig(**config)
