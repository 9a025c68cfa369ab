"""A fake adapter as a value and as files. Imports numpy and no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from training.atomic_directory import new_directory, read_meta, write_meta
from training.engine.interface import CapturedAdapter
from training.errors import CheckpointNotFound
from training.peft_import.config import CONFIG_NAME
from training.peft_import.files import WEIGHTS_NAME, read_peft_files
from training.types import LoraConfig

FloatArray = NDArray[np.float32]

CLASSES = 8
"""A token's class is token % 8; the model predicts the next token's class."""
MODULE = "fake"
"""The only layer, of which an export has matrices. The first row of A is the weights."""

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


def export_peft(directory: Path, weights: FloatArray, config: LoraConfig) -> int:
    """Write the weights as an adapter in peft's format; return the bytes."""
    a = np.zeros((config.rank, weights.size), np.float32)
    a[0] = weights.reshape(-1)
    prefix = f"base_model.model.{MODULE}"
    b = np.zeros((1, config.rank), np.float32)
    values = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": [MODULE],
    }
    with new_directory(directory) as temporary:
        tensors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        save_file(tensors, temporary / WEIGHTS_NAME)
        (temporary / CONFIG_NAME).write_text(json.dumps(values))
        return sum(path.stat().st_size for path in temporary.iterdir())


def import_peft(directory: Path) -> tuple[LoraConfig, FloatArray]:
    """The shape and the weights of an export, or of any adapter: then their digest decides.

    Raises:
        CheckpointNotFound: No such directory.
        InvalidRequest: It is no adapter in peft's format.
    """
    if not directory.is_dir():
        raise CheckpointNotFound(f"No adapter at {directory.name}.")
    files = read_peft_files(directory)
    shape = (CLASSES, CLASSES)
    if MODULE in files.ranks:
        a = load_file(directory / WEIGHTS_NAME)[f"base_model.model.{MODULE}.lora_A.weight"]
        return replace(files.lora_config, target_modules=None), a[0].reshape(shape)
    draw = np.random.default_rng(int(files.sha256(), 16)).standard_normal(shape)
    return files.lora_config, (0.01 * draw).astype(np.float32)
