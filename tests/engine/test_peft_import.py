"""Adapters that peft trained, imported: the same logits as stock peft, and refusals by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.engine.reference import TinyTrainer, peft_warnings_ignored
from training.errors import InvalidRequest
from training.types import AdamParams, Datum, LoraConfig

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MakeAdapter = Callable[..., Path]


def stock_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


@pytest.fixture
def make_adapter(untied_folder: Path, tmp_path: Path) -> MakeAdapter:
    """Save a random adapter as somebody with stock peft would; its folder."""

    def make(*, folder: Path = untied_folder, dtype: torch.dtype = torch.float32, **fields) -> Path:
        torch.manual_seed(1)
        with peft_warnings_ignored():
            model = peft.get_peft_model(
                stock_model(folder), peft.LoraConfig(task_type="CAUSAL_LM", **fields)
            )
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.data.normal_(0, 0.3)
                    parameter.data = parameter.data.to(dtype)
            model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


def stock_logprobs(folder: Path, adapter: Path, tokens: list[int]) -> np.ndarray:
    with peft_warnings_ignored(), torch.no_grad():
        model = peft.PeftModel.from_pretrained(stock_model(folder), adapter).eval()
        logits = model(torch.tensor([tokens])).logits[0].double()
    predicted = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])
    return predicted[:, 0].numpy()


def our_logprobs(trainer: TinyTrainer, tokens: list[int]) -> np.ndarray:
    inputs = {
        "target_tokens": np.array(tokens[1:], np.int64),
        "weights": np.ones(len(tokens) - 1, np.float32),
    }
    datum = Datum(model_input=np.array(tokens[:-1], np.int32), loss_fn_inputs=inputs)
    return trainer.train_one("a", [datum], forward_only=True).logprobs[0]


TOKENS = [int(token) for token in np.random.default_rng(0).integers(3, 250, 24)]


@pytest.mark.parametrize(
    ("fields", "config"),
    [
        ({"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}, (4, 6.0)),
        ({"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}, (3, 5.0)),
        (
            {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "use_rslora": True},
            (4, 12.0),
        ),
        ({"r": 2, "target_modules": r".*\.1\.(self_attn\.[qk]|mlp\.up)_proj"}, (2, 8.0)),
        ({"r": 2, "target_modules": ["lm_head", "down_proj"]}, (2, 8.0)),
        (
            {"r": 2, "target_modules": ATTENTION, "layers_to_transform": [1]},
            (2, 8.0),
        ),
        (
            {
                "r": 2,
                "target_modules": ATTENTION,
                "layers_to_transform": 0,
                "layers_pattern": "layers",
            },
            (2, 8.0),
        ),
        ({"r": 2, "target_modules": "all-linear", "exclude_modules": ["q_proj"]}, (2, 8.0)),
        ({"r": 2, "target_modules": "all-linear", "exclude_modules": r".*\.0\..*"}, (2, 8.0)),
        (
            {
                "r": 4,
                "lora_alpha": 8,
                "target_modules": ATTENTION,
                "rank_pattern": {"q_proj": 6, r"layers\.1\..*k_proj": 2},
                "alpha_pattern": {"v_proj": 3, r"layers\.0\.self_attn\.o_proj": 5},
            },
            (6, 12.0),
        ),
        (
            {
                "r": 4,
                "lora_alpha": 8,
                "target_modules": ATTENTION,
                "rank_pattern": {"q_proj": 2},
                "use_rslora": True,
            },
            (4, 16.0),
        ),
        ({"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.1}, (2, 8.0)),
        ({"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"}, (2, 8.0)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_an_imported_adapter_has_the_logits_of_stock_peft(
    request, make_engine, make_adapter, kind, fields, config
):
    folder = request.getfixturevalue(f"{kind}_folder")
    adapter = make_adapter(folder=folder, **fields)
    trainer = make_engine(tied=kind == "tied")
    imported = trainer.import_adapter("a", adapter)
    assert (imported.rank, imported.alpha) == config
    ours = our_logprobs(trainer, TOKENS)
    np.testing.assert_allclose(ours, stock_logprobs(folder, adapter, TOKENS), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_matrices_of_another_type_are_read_as_they_are(
    make_engine, untied_folder, make_adapter, dtype
):
    adapter = make_adapter(r=2, target_modules=["q_proj"], dtype=dtype)
    trainer = make_engine(tied=False)
    trainer.import_adapter("a", adapter)
    ours = our_logprobs(trainer, TOKENS)
    np.testing.assert_allclose(ours, stock_logprobs(untied_folder, adapter, TOKENS), atol=2e-5)


@pytest.mark.parametrize(
    ("targets", "flags"),
    [
        ("all-linear", (True, True, False)),
        (ATTENTION, (False, True, False)),
        (["gate_proj", "up_proj", "down_proj", "lm_head"], (True, False, True)),
    ],
)
def test_an_adapter_of_whole_groups_has_the_flags_of_a_model_made_here(
    make_engine, make_adapter, targets, flags
):
    trainer = make_engine(tied=False)
    config = trainer.import_adapter("a", make_adapter(r=2, target_modules=targets))
    assert config.target_modules is None
    assert (config.train_mlp, config.train_attn, config.train_unembed) == flags
    trainer.create_adapter("b", config)
    assert list(trainer.layout_of("a").places) == list(trainer.layout_of("b").places)


def test_an_export_imported_and_exported_again_has_equal_tensors(make_engine, tmp_path):
    trainer = make_engine(tied=False)
    config = LoraConfig(rank=4, alpha=6.0)
    trainer.create_adapter("a", config)
    trainer.randomise("a")
    trainer.save_peft("a", tmp_path / "first")
    assert trainer.import_adapter("b", tmp_path / "first") == config
    trainer.save_peft("b", tmp_path / "second")
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [
        json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("first", "second")
    ]
    assert sorted(configs[0].pop("target_modules")) == sorted(configs[1].pop("target_modules"))
    assert configs[0] == configs[1]


def test_an_imported_adapter_trains_on_as_one_without_moments(
    make_engine, make_adapter, make_datum
):
    adapter = make_adapter(r=4, lora_alpha=6, target_modules=ATTENTION)
    trainer = make_engine(tied=False)
    config = trainer.import_adapter("a", adapter)
    state = trainer.adapter_state("a")
    assert state["step"] == 0
    assert not any(state[name].any() for name in ("exp_avg", "exp_avg_sq", "grad"))
    trainer.create_adapter("b", config)
    trainer.set_weights("b", state["weights"])
    for name in ("a", "b"):
        for seed in range(2):
            trainer.train_one(name, [make_datum(9, seed=seed)])
            trainer.optim_step(name, AdamParams(learning_rate=1e-2))
    assert np.array_equal(*(trainer.adapter_state(name)["weights"] for name in ("a", "b")))


def test_rows_that_fill_up_a_smaller_rank_stay_zero_in_training(
    make_engine, make_adapter, make_datum
):
    adapter = make_adapter(r=4, target_modules=ATTENTION, rank_pattern={"q_proj": 2})
    trainer = make_engine(tied=False)
    trainer.import_adapter("a", adapter)
    trainer.train_one("a", [make_datum(9)])
    trainer.optim_step("a", AdamParams(learning_rate=1e-2, weight_decay=0.1))
    layout = trainer.layout_of("a")
    flat = torch.from_numpy(trainer.adapter_state("a")["weights"])
    for name in layout.places:
        a, b = layout.pair(flat, name)
        rank = 2 if name.endswith("q_proj") else 4
        assert a[:rank].all()
        assert b[:, :rank].all()
        assert not a[rank:].any()
        assert not b[:, rank:].any()


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "bias": ({"bias": "all"}, "bias"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "parameters": ({"target_parameters": ["x.scale"]}, "target_parameters: 'x.scale' is not"),
    "another parameter": ({"target_parameters": ["k_proj.weight"]}, "lacks the matrices of"),
    "rows": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "replication": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "kind": ({"peft_type": "IA3"}, "peft_type"),
    "later": ({"use_next_years_lora": True}, "use_next_years_lora"),
    "rank": ({"r": 0}, "r:"),
    "another rank": ({"r": 3}, "rank 2, but adapter_config.json says 3"),
    "alpha": ({"lora_alpha": -1}, "lora_alpha"),
    "no number": ({"lora_alpha": float("nan")}, "lora_alpha"),
    "no modules": ({"target_modules": []}, "target_modules"),
    "pattern": ({"target_modules": "(q_proj"}, "target_modules: not a regular expression"),
    "endless": (
        {"rank_pattern": {"((.|\\w)+)+(?<=z)": 2}},
        "rank_pattern: its patterns",
    ),
    "long": ({"alpha_pattern": {"a" * 5000: 2}}, "alpha_pattern: a pattern has more"),
    "more modules": ({"target_modules": ["q_proj", "k_proj"]}, "lacks the matrices of"),
    "fewer modules": ({"layers_to_transform": [0]}, "does not select"),
}


@pytest.mark.parametrize(("change", "named"), CHANGES.values(), ids=CHANGES.keys())
def test_a_configuration_that_is_not_computed_is_refused_by_name(
    make_engine, make_adapter, change, named
):
    adapter = make_adapter(r=2, target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    trainer = make_engine(tied=False)
    with pytest.raises(InvalidRequest) as refusal:
        trainer.import_adapter("a", adapter)
    assert named in str(refusal.value)
    assert trainer.adapter_names() == []


Q = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "NaN": (lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan")), "NaN"),
    "infinite": (lambda t: t[f"{Q}.lora_B.weight"].fill_(float("inf")), "infinite"),
    "no A": (lambda t: t.pop(f"{Q}.lora_A.weight"), "lora_A.weight is missing"),
    "no pair": (
        lambda t: [t.pop(f"{Q}.lora_{side}.weight") for side in "AB"],
        "lacks the matrices of 'model.layers.0.self_attn.q_proj'",
    ),
    "narrow": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 15)}),
        "shape [2, 15]; this base model's layer needs [2, 16]",
    ),
    "two ranks": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 16)}),
        "lora_A has shape [3, 16] and lora_B [16, 2]",
    ),
    "convolution": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 16, 1)}),
        "expected a matrix",
    ),
    "embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2)}),
        "lora_embedding_A",
    ),
    "other layer": (
        lambda t: t.update(
            {f"{Q.replace('.0.', '.7.')}.lora_{s}.weight": torch.ones(2, 2) for s in "AB"}
        ),
        "'model.layers.7.self_attn.q_proj' is no linear layer of this base model",
    ),
    "other head": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(259, 16)}),
        "differs from this base model's weights",
    ),
    "other norm": (
        lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(16)}),
        "is no LoRA matrix",
    ),
    "whole numbers": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 16, dtype=torch.int32)}),
        "type 'I32'",
    ),
}


@pytest.mark.parametrize(("change", "named"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_do_not_fit_are_refused_by_name(make_engine, make_adapter, change, named):
    adapter = make_adapter(r=2, target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    trainer = make_engine(tied=False)
    with pytest.raises(InvalidRequest) as refusal:
        trainer.import_adapter("a", adapter)
    assert str(refusal.value).startswith("adapter_model.safetensors: ")
    assert named in str(refusal.value)
    assert trainer.adapter_names() == []
