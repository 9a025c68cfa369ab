"""A version of an adapter's weights as a folder that vLLM loads: peft's format, without experts.

It is written for one server and can be written again, so nothing is fsynced and nothing has a
checksum.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from training.engine.torch.adapters import AdapterLayout

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(folder: Path, layout: AdapterLayout, flat: Tensor, base_model_name: str) -> None:
    """Write a new folder.

    Args:
        layout: Of an adapter without experts.
        flat: (P,) float32, in the host's memory.

    Raises:
        OSError: It cannot be written.
    """
    folder.mkdir(parents=True)
    tensors = {}
    for name in layout.places:
        a, b = layout.pair(flat, name)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / WEIGHTS_NAME, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": layout.rank,
        "lora_alpha": layout.config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": sorted(_last_parts(layout.places)),
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config))


def _last_parts(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}
