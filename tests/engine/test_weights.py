"""Checkpoints: whole or absent, and the next step after a load is the step that would have been."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from tests.engine.reference import peft_warnings_ignored
from tests.engine.test_trainer import STEP
from tests.tiny_model import VOCAB_SIZE
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.errors import (
    CheckpointNotFound,
    InvalidRequest,
    StorageFailed,
    StorageFull,
)
from training.types import LoraConfig


@pytest.fixture
def trained(engine, make_datum):
    """An engine whose adapter ``a`` has taken two steps and holds a gradient."""
    engine.create_adapter("a", LoraConfig(rank=4, alpha=6.0))
    for seed in range(2):
        engine.train_one("a", [make_datum(9, seed=seed)])
        engine.optim_step("a", STEP)
    engine.train_one("a", [make_datum(7)])
    return engine


def test_a_checkpoint_to_sample_from_takes_memory_for_its_weights_and_nothing_else(
    trained, tied_base_model, tmp_path
):
    trained.save_adapter("a", tmp_path / "c")
    weights = trained.adapter_state("a")["weights"]
    text = ChatRenderer(tied_base_model.tokenizer, VOCAB_SIZE)
    sampler = ContinuousSampler(tied_base_model, text)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocations:
        sampler.publish("v", tmp_path / "c")
    taken = [event.self_cpu_memory_usage for event in allocations.events()]
    assert sum(taken) == weights.nbytes
    # The data read and, for a moment, its copy at an aligned address.
    assert sum(size for size in taken if size > 0) < 3 * weights.nbytes


def test_meta_can_be_read_by_eye(trained, tmp_path):
    trained.save_adapter("a", tmp_path / "c")
    meta = json.loads((tmp_path / "c" / "meta.json").read_text())
    assert meta["step"] == 2
    assert meta["config"]["rank"] == 4
    assert meta["base_model"] == trained.info.name
    assert meta["versions"]["torch"]
    assert set(meta["sha256"]) == {
        "meta.json",
        *(f"{name}.safetensors" for name in ("weights", "grad", "exp_avg", "exp_avg_sq")),
    }


def test_a_missing_or_damaged_checkpoint_is_refused(trained, tmp_path):
    with pytest.raises(CheckpointNotFound, match="No checkpoint at nowhere"):
        trained.load_adapter("b", tmp_path / "nowhere")
    trained.save_adapter("a", tmp_path / "c")
    path = tmp_path / "c" / "exp_avg.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointNotFound, match=r"exp_avg\.safetensors is damaged"):
        trained.load_adapter("b", tmp_path / "c")
    meta_path = tmp_path / "c" / "meta.json"
    meta_path.write_text(meta_path.read_text().replace('"step": 2', '"step": 3'))
    with pytest.raises(CheckpointNotFound, match=r"meta\.json is damaged"):
        trained.load_adapter("b", tmp_path / "c")
    meta_path.write_text("{")
    with pytest.raises(CheckpointNotFound, match=r"meta\.json is damaged"):
        trained.load_adapter("b", tmp_path / "c")
    assert trained.adapter_names() == ["a"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing_behind(trained, tmp_path, monkeypatch, code):
    written = []

    def full(descriptor):
        written.append(descriptor)
        if len(written) == 3:
            raise OSError(code, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull):
        trained.save_adapter("a", tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS])
def test_a_disk_that_fails_otherwise_is_said_by_name(trained, tmp_path, monkeypatch, code):
    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageFailed, match=os.strerror(code)):
        trained.save_adapter("a", tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_for_another_base_model_is_refused(trained, tmp_path):
    trained.save_adapter("a", tmp_path / "c")
    path = tmp_path / "c" / "meta.json"
    meta = json.loads(path.read_text().replace("model.layers.1.mlp", "model.layers.7.mlp"))
    del meta["sha256"]["meta.json"]
    path.write_text(json.dumps(meta))
    with pytest.raises(InvalidRequest, match=r"whose model\.layers\.7\.mlp\.gate_proj"):
        trained.load_adapter("b", tmp_path / "c")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_stock_peft_loads_an_export_and_computes_the_same(
    tied, make_engine, make_datum, tmp_path, tied_folder, untied_folder
):
    engine = make_engine(tied=tied)
    engine.create_adapter("a", LoraConfig(rank=4, alpha=6.0))
    engine.randomise("a")
    datum = make_datum(12)
    expected = engine.train_one("a", [datum]).logprobs[0]

    engine.save_peft("a", tmp_path / "export")

    base = AutoModelForCausalLM.from_pretrained(tied_folder if tied else untied_folder)
    with peft_warnings_ignored():
        model = peft.PeftModel.from_pretrained(base, tmp_path / "export")
    tokens = torch.from_numpy(datum.model_input.astype(np.int64))[None]
    targets = torch.from_numpy(datum.loss_fn_inputs["target_tokens"])[:, None]
    with torch.no_grad():
        logprobs = model(input_ids=tokens).logits[0].log_softmax(-1).gather(1, targets)
    np.testing.assert_allclose(expected, logprobs[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_merged_by_the_lines_of_its_readme_an_export_computes_the_same(
    tied, make_engine, make_datum, tmp_path, monkeypatch
):
    engine = make_engine(tied=tied)
    engine.create_adapter("a", LoraConfig(rank=4, alpha=6.0))
    engine.randomise("a")
    datum = make_datum(12)
    expected = engine.train_one("a", [datum]).logprobs[0]
    engine.save_peft("a", tmp_path / "export")
    monkeypatch.chdir(tmp_path / "export")

    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    with peft_warnings_ignored():
        exec("".join(blocks), names)  # noqa: S102 - our own lines, as a reader would run them
    names["merged"].save_pretrained("merged")
    merged = AutoModelForCausalLM.from_pretrained("merged")
    tokens = torch.from_numpy(datum.model_input.astype(np.int64))[None]
    targets = torch.from_numpy(datum.loss_fn_inputs["target_tokens"])[:, None]
    with torch.no_grad():
        logprobs = merged(input_ids=tokens).logits[0].log_softmax(-1).gather(1, targets)
    np.testing.assert_allclose(expected, logprobs[:, 0], rtol=1e-5, atol=1e-5)


def test_an_export_without_the_head_says_nothing_of_merging(engine, tmp_path):
    engine.create_adapter("a", LoraConfig(rank=4, alpha=6.0, train_unembed=False))
    engine.save_peft("a", tmp_path / "export")
    readme = (tmp_path / "export" / "README.md").read_text()
    assert "peft.PeftModel.from_pretrained" in readme
    assert "merge" not in readme
