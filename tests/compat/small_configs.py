"""Small configurations of every family, of those too that hold others: a text model with its eyes.

A size is known by its name (``tests.engine.families.SMALL``). Families whose sizes must fit each
other say what they need besides.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.engine.families import SMALL, small_config
from tests.tiny_model import VOCAB_SIZE

NEEDED: dict[str, dict[str, Any]] = {
    "bloom": {"seq_length": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": (8, 8),
        "axial_pos_shape": (8, 8),
        "attn_layers": ["local", "lsh"],
    },
    "stablelm": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
        }
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 4},
    "gemma4_unified_text": {
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 4,
    },
    "gemma3n_text": {
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 4,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
        "laurel_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_expand": 2, "mamba_chunk_size": 16},
    "mamba2": {"num_heads": 4, "head_dim": 8, "expand": 2, "state_size": 4, "n_groups": 1},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "n_mamba_heads": 2,
        "mamba_d_state": 4,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "n_mamba_heads": 4,
        "mamba_headdim": 8,
        "num_mem_blocks": 1,
    },
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1, "topk_group": 1, "n_group": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "llama4_text": {"moe_layers": [1], "intermediate_size_mlp": 32},
}
"""Settings that some families need besides sizes."""

ALL_HEADS = {"num_key_value_heads": 4}
NEEDED |= dict.fromkeys(
    (
        *("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
        *("axk1", "axk2", "youtu", "longcat_flash", "minicpm3"),
    ),
    ALL_HEADS,
)
"""Latent attention has a key for each head."""
_GROUPS = {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
NEEDED |= {name: {**ALL_HEADS, **_GROUPS} for name in ("deepseek_v3", "axk1")}

WIDE: dict[str, Any] = {"hidden_size": 32, "head_dim": 8, "num_hidden_layers": 4}
"""Of text models whose positions have three axes, or of which each fourth layer differs."""
NEEDED |= dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), WIDE)

_EYES: dict[str, Any] = {
    "patch_size": 4,
    "image_size": 16,
    "depth": 2,
    "num_heads": 2,
    "out_hidden_size": 16,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [],
}
_OF_TEXT = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}


def small(model_type: str) -> PretrainedConfig:
    """A family's configuration with every size small, also inside the configurations it holds."""
    cls = CONFIG_MAPPING[model_type]
    held = getattr(cls, "sub_configs", {})
    if not held:
        return small_config(model_type, **NEEDED.get(model_type, {}))
    whole = cls()
    parts = {
        name: _small_part(part)
        for name in held
        if isinstance(part := getattr(whole, name, None), PretrainedConfig)
    }
    text = parts.get("text_config", {})
    for name, part in parts.items():
        if "out_hidden_size" in part and name != "text_config":
            part["out_hidden_size"] = text.get("hidden_size", 16)
    return small_config(model_type, **parts, **NEEDED.get(model_type, {}))


def _small_part(part: PretrainedConfig) -> dict[str, Any]:
    if part.model_type in CONFIG_MAPPING and hasattr(part, "vocab_size"):
        return small_config(part.model_type, **NEEDED.get(part.model_type, {})).to_dict()
    values = part.to_dict()
    sizes = {**{k: v for k, v in SMALL.items() if k not in _OF_TEXT}, **_EYES}
    return {**values, **{name: sizes[name] for name in values if name in sizes}}
