"""A folder as peft's ``save_pretrained`` leaves it, made without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def make_peft_folder(folder: Path, *, seed: int = 0, **fields: Any) -> Path:
    """A rank 2 adapter of one projection of two small layers; ``fields`` change its config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "somebody/a-model",
        "r": 2,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    rng = np.random.default_rng(seed)
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": rng.normal(
            size=shape
        ).astype(np.float32)
        for layer in range(2)
        for side, shape in (("A", (2, 16)), ("B", (16, 2)))
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
