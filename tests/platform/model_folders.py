"""A folder that looks like a base model's as long as it is not loaded."""

from __future__ import annotations

import json
from pathlib import Path


def make_model_folder(folder: Path) -> Path:
    """Write a configuration and a tokenizer without content, and weights of four bytes."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").touch()
    (folder / "model.safetensors").write_bytes(weights())
    return folder


def weights() -> bytes:
    """A safetensors file with one number."""
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)
