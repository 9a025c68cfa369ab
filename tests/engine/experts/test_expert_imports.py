"""Adapters on experts that peft trained, or that we exported, imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.engine.families import save_random, small_config
from tests.engine.reference import TinyTrainer, peft_warnings_ignored
from tests.engine.test_peft_import import TOKENS, our_logprobs, stock_logprobs
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import load_base_model
from training.errors import InvalidRequest
from training.types import AdamParams, Datum, LoraConfig

DATUM = Datum(
    model_input=np.array(TOKENS[:-1], np.int32),
    loss_fn_inputs={
        "target_tokens": np.array(TOKENS[1:], np.int64),
        "weights": np.ones(len(TOKENS) - 1, np.float32),
    },
)

KINDS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"shared_expert_intermediate_size": 24},
    "gpt_oss": {},
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [0]},
}
"""With a shared expert; with matrices stored the other way round, gate and up in turns; with a
dense layer whose projections are named like the experts'."""


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory) -> Path:
    config = small_config(request.param, **KINDS[request.param])
    return Path(save_random(config, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def base_model(folder: Path) -> BaseModel:
    return load_base_model(str(folder), dtype="float32", device="cpu")


@pytest.mark.parametrize("shares", [True, False])
def test_an_export_comes_back_and_is_exported_as_it_was(
    base_model: BaseModel, tmp_path: Path, shares: bool
) -> None:
    trainer = TinyTrainer(base_model)
    trainer.create_adapter("a", LoraConfig(rank=3, alpha=5.0, share_across_experts=shares))
    trainer.randomise("a")
    trainer.save_peft("a", tmp_path / "first")

    config = trainer.import_adapter("b", tmp_path / "first")

    assert (config.rank, config.alpha, config.target_modules) == (3, 5.0, None)
    assert config.share_across_experts is shares
    np.testing.assert_allclose(
        *(trainer.train_one(n, [DATUM], forward_only=True).logprobs[0] for n in "ab"), atol=1e-5
    )
    trainer.save_peft("b", tmp_path / "second")
    assert trainer.layout_of("b").places == trainer.layout_of("a").places
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        first, second = ((tmp_path / n / name).read_bytes() for n in ("first", "second"))
        assert first == second, name
    before = trainer.adapter_state("b")["weights"]
    trainer.train_one("b", [DATUM])
    trainer.optim_step("b", AdamParams(learning_rate=1e-2))
    assert (trainer.adapter_state("b")["weights"] != before).any()


def peft_adapter(folder: Path, directory: Path, **fields: Any) -> Path:
    """A random adapter on the experts, as somebody with stock peft would save it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = {"target_modules": [], "target_parameters": parameters, "lora_alpha": 6, **fields}
    with peft_warnings_ignored():
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data.normal_(0, 0.2)
        model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 3},
        {"r": 2, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}},
        {"r": 2, "target_parameters": ["experts.down_proj"], "alpha_pattern": {"down_proj": 3}},
        {"r": 4, "use_rslora": True},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_an_adapter_of_stock_peft_has_its_logits(
    folder: Path, base_model: BaseModel, tmp_path: Path, fields: dict[str, Any]
) -> None:
    adapter = peft_adapter(folder, tmp_path / "adapter", **fields)
    trainer = TinyTrainer(base_model)
    trainer.import_adapter("a", adapter)
    ours = our_logprobs(trainer, TOKENS)
    np.testing.assert_allclose(ours, stock_logprobs(folder, adapter, TOKENS), atol=5e-5)


def test_experts_that_do_not_fit_are_refused_by_name(
    folder: Path, base_model: BaseModel, tmp_path: Path
) -> None:
    adapter = peft_adapter(folder, tmp_path / "adapter", r=2)
    trainer = TinyTrainer(base_model)
    config = json.loads((adapter / "adapter_config.json").read_text())

    def refusal(**changes: Any) -> str:
        (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(InvalidRequest) as refused:
            trainer.import_adapter("a", adapter)
        return str(refused.value)

    assert "at rank 4 needs" in refusal(rank_pattern={"gate_up_proj": 4})
    assert "at rank 3 needs" in refusal(r=3)
    assert "which target_parameters does not select" in refusal(
        target_parameters=["experts.down_proj"]
    )
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(adapter / "adapter_model.safetensors")
    left = {name: value for name, value in tensors.items() if ".base_layer." not in name}
    save_file(left, adapter / "adapter_model.safetensors")
    with pytest.raises(InvalidRequest, match=r"lacks the matrices of 'model\.layers"):
        trainer.import_adapter("a", adapter)
    assert trainer.adapter_names() == []
