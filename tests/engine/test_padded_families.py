"""Families whose sequences cannot be one packed stream: served in the padded layout.

The judge trains, scores and samples as clients do, and compares with stock transformers and peft.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.families import judge, save_random, small_config
from training.engine.torch.loading import load_base_model
from training.errors import BaseModelNotFound

GATED_DELTA = {
    "initializer_range": 0.1,  # wide weights make these layers too steep for float32
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_hidden_layers": 4,
}
"""Three layers with a recurrent state, then one with attention."""

MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "partial_rotary_factor": 1.0,
        "mrope_section": [1, 1, 0],
    }
}
MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
FULL = ["full_attention"]
THREE = {"num_hidden_layers": 3}
LATENT = {"first_k_dense_replace": 1, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1}
SHARED = {"shared_expert_intermediate_size": 16}

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_5_text", {**GATED_DELTA, **MROPE}),
    ("qwen3_5_moe_text", {**GATED_DELTA, **MROPE, **SHARED}),
    ("qwen3_next", {**GATED_DELTA, **SHARED}),
    ("olmo_hybrid", GATED_DELTA),
    (
        "kimi_linear",
        {
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            **THREE,
            "first_k_dense_replace": 3,
            "linear_num_heads": 4,
            "linear_head_dim": 8,
            "num_key_value_heads": 4,
            "model_max_length": 64,
        },
    ),
    ("mamba", {}),
    ("falcon_mamba", {}),
    ("mamba2", {"num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16}),
    ("falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}),
    (
        "jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
    ),
    ("bamba", {"attn_layer_indices": [1], **THREE}),
    (
        "granitemoehybrid",
        {**MIXED, **THREE, "num_local_experts": 0, "num_experts_per_tok": 0},
    ),
    (
        "nemotron_h",
        {
            "layer_types": ["linear_attention", "moe", "full_attention", "mlp"],
            "num_hidden_layers": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "n_group": 1,
            "topk_group": 1,
            "moe_shared_expert_intermediate_size": 16,
            "chunk_size": 16,
        },
    ),
    ("lfm2", {"layer_types": ["conv", "full_attention", "conv"], **THREE}),
    ("deepseek_v3", LATENT),
    ("deepseek_v2", LATENT),
    ("falcon", {}),
    ("xglm", {}),
    ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 8}),
    ("mpt", {}),
    ("bloom", {"seq_length": 64}),
    ("diffllama", {}),
    ("doge", {}),
    ("codegen", {}),
    (
        "llama4_text",
        {
            "moe_layers": [],
            "intermediate_size_mlp": 32,
            "num_hidden_layers": 4,
            "attn_temperature_tuning": True,
        },
    ),
]


@pytest.mark.parametrize(
    ("model_type", "changes"), FAMILIES, ids=[model_type for model_type, _ in FAMILIES]
)
def test_a_family_in_the_padded_layout_is_computed_as_transformers_does(
    model_type: str, changes: dict[str, Any], tmp_path
) -> None:
    folder = save_random(small_config(model_type, **changes), tmp_path)
    verdict, what, differences = judge(folder, layout="padded")
    assert (verdict, what) == ("right", ""), differences


def test_the_layout_is_the_first_that_is_proven_and_may_be_demanded(tied_folder, tmp_path) -> None:
    hybrid = save_random(small_config("lfm2", **THREE, layer_types=["conv"] * 2 + FULL), tmp_path)

    def layout_of(folder: str, layout: str) -> str:
        return load_base_model(folder, dtype="float32", device="cpu", layout=layout).info.layout

    assert layout_of(str(tied_folder), "auto") == "packed"
    assert layout_of(str(tied_folder), "padded") == "padded"
    assert layout_of(hybrid, "auto") == layout_of(hybrid, "padded") == "padded"
    with pytest.raises(BaseModelNotFound, match=r"served: packed, attention is asked for 1 times"):
        layout_of(hybrid, "packed")
