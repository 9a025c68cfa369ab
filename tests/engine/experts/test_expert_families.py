"""Families of experts: each is computed, trained and exported as transformers and peft do it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.families import judge, save_random, small_config

LLAMA4 = {"intermediate_size_mlp": 32, "num_hidden_layers": 4, "attn_temperature_tuning": False}

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {}),
    ("mixtral", {}),
    ("olmoe", {}),
    ("gpt_oss", {}),
    ("glm4_moe", {"first_k_dense_replace": 1}),
    ("minimax_m2", {}),
    ("llama4_text", {**LLAMA4, "interleave_moe_layer_step": 2}),
    ("llama4_text", {**LLAMA4, "num_experts_per_tok": 2}),
    ("granitemoe", {}),
    ("granitemoeshared", {}),
    ("qwen2_moe", {}),
    ("ernie4_5_moe", {}),
    ("dots1", {"n_shared_experts": 1}),
    (
        "granitemoehybrid",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_hidden_layers": 3,
        },
    ),
    (
        "lfm2_moe",
        {
            "layer_types": ["conv", "full_attention", "conv"],
            "num_hidden_layers": 3,
            "num_dense_layers": 1,
        },
    ),
]
"""Experts with biases, stored transposed, gates interleaved, shared experts beside them, layers
without experts, a share of the input and not of the output."""


def name_of(value: Any) -> str:
    return value if isinstance(value, str) else ",".join(map(str, value)) or "plain"


@pytest.mark.parametrize(("model_type", "changes"), FAMILIES, ids=name_of)
def test_a_family_of_experts_is_computed_as_transformers_and_peft_do(
    model_type: str, changes: dict[str, Any], tmp_path
) -> None:
    folder = save_random(small_config(model_type, **changes), tmp_path)
    verdict, what, differences = judge(folder)
    assert (verdict, what) == ("right", ""), differences


@pytest.mark.parametrize(
    ("model_type", "changes"), [FAMILIES[0], FAMILIES[3], FAMILIES[6]], ids=name_of
)
def test_experts_that_share_nothing_are_right_too(
    model_type: str, changes: dict[str, Any], tmp_path
) -> None:
    folder = save_random(small_config(model_type, **changes), tmp_path)
    verdict, what, differences = judge(folder, share_across_experts=False)
    assert (verdict, what) == ("right", ""), differences


@pytest.mark.parametrize("rank", [1, 8])
def test_every_rank_is_right(rank: int, tmp_path) -> None:
    folder = save_random(small_config("gpt_oss"), tmp_path)
    verdict, what, differences = judge(folder, rank=rank)
    assert (verdict, what) == ("right", ""), differences


@pytest.mark.parametrize("targets", [("gate_proj",), ("up_proj",), ("down_proj", "q_proj")])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama4_text"])
def test_a_part_of_an_expert_can_be_adapted_alone(
    model_type: str, targets: tuple[str, ...], tmp_path
) -> None:
    changes = LLAMA4 if model_type == "llama4_text" else {}
    folder = save_random(small_config(model_type, **changes), tmp_path)
    verdict, what, differences = judge(folder, target_modules=targets)
    assert (verdict, what) == ("right", ""), differences
