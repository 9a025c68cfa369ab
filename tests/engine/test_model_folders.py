"""Folders as they come: their code is never run, and what cannot be served is said truly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.engine.torch.loading import load_base_model
from training.errors import BaseModelNotFound


@pytest.fixture
def folder(tied_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tied_folder, tmp_path / "model"))


def configure(folder: Path, name: str = "config.json", **changes: object) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load(folder: Path):
    return load_base_model(str(folder), dtype="float32", device="cpu")


@pytest.fixture
def trap(folder: Path) -> Path:
    """A file that exists as soon as the folder's code has run."""
    caught = folder.parent / "caught"
    code = f"open({str(caught)!r}, 'w')\n"
    for name in ("configuration_mine.py", "modeling_mine.py", "tokenization_mine.py"):
        (folder / name).write_text(code)
    return caught


CODE = {
    "AutoConfig": "configuration_mine.MineConfig",
    "AutoModelForCausalLM": "modeling_mine.MineModel",
}


def test_code_beside_a_known_family_is_not_run(folder, trap):
    configure(folder, auto_map=CODE)
    configure(
        folder,
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_mine.MineTokenizer", None]},
    )
    assert load(folder).head_name == "lm_head"
    assert not trap.exists()


def test_a_family_that_only_the_folders_code_knows_is_refused(folder, trap):
    configure(folder, auto_map=CODE, model_type="mine")
    with pytest.raises(BaseModelNotFound, match="contains custom code"):
        load(folder)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation"])
def test_the_attention_that_a_folder_asks_for_is_not_used(folder, name):
    """Such a name is a repository on a hub, whose kernels transformers would fetch and run."""
    configure(folder, **{name: "somebody/attention"})
    assert load(folder).head_name == "lm_head"


def test_pickled_weights_are_refused_and_not_opened(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(BaseModelNotFound, match=r"pytorch_model\.bin, a pickle, which may hold"):
        load(folder)


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"bits": 4}, "an unknown method"),
    ],
)
def test_quantized_weights_are_refused_by_their_method(folder, quantization, method):
    configure(folder, quantization_config=quantization)
    with pytest.raises(BaseModelNotFound, match=f"holds weights quantized by {method}"):
        load(folder)
