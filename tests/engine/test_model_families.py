"""Families of models: each is computed as stock transformers and peft compute it, or refused.

The judge trains and samples as clients do. All causal types of transformers were judged so once
(``tests/compat/model_families.json``); here are those that differ in what could go wrong.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.engine.families import CONTEXT_TOKENS, judge, save_random, small_config
from tests.tiny_model import VOCAB_SIZE


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **parameters}}


LONGROPE = rope(
    "longrope",
    short_factor=[1.0, 1.1],
    long_factor=[2.0, 3.5],
    original_max_position_embeddings=CONTEXT_TOKENS // 2,
)


GEMMA4 = {
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 4,
    "global_head_dim": 8,
}
"""Heads of the layers that see everything are larger than those of the others."""

LLAMA4 = {"moe_layers": [], "intermediate_size_mlp": 32, "num_hidden_layers": 4}
"""Without experts; three layers of four attend by chunks."""


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", rope("linear", factor=4.0)),
        ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
        (
            "llama",
            rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
        ("llama", rope("dynamic", factor=4.0)),
        ("phi3", {**LONGROPE, "original_max_position_embeddings": CONTEXT_TOKENS // 2}),
        ("mistral", {"sliding_window": 5}),
        ("mistral", {"sliding_window": 140, "max_position_embeddings": 330}),
        ("ministral", {"sliding_window": 16}),
        ("gemma3_text", {"sliding_window": 16, "num_hidden_layers": 7}),
        ("olmo3", {"sliding_window": 16, "num_hidden_layers": 4}),
        ("phi3", {"sliding_window": 16}),
        ("exaone4", {"sliding_window": 16, "num_hidden_layers": 4}),
        ("granite_swa", {"sliding_window": 16, "num_hidden_layers": 4}),
        ("starcoder2", {"sliding_window": 16}),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 16,
                "max_window_layers": 1,
                "num_hidden_layers": 3,
            },
        ),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("smollm3", {"num_hidden_layers": 4}),
        ("olmo2", {}),
        ("granite", {}),
        ("starcoder2", {}),
        ("gemma4_text", {**GEMMA4, "num_hidden_layers": 6}),
        ("gemma4_text", {**GEMMA4, "num_hidden_layers": 7, "num_kv_shared_layers": 1}),
        ("llama4_text", {**LLAMA4, "attn_temperature_tuning": False}),
        ("gemma2", {"num_hidden_layers": 3, "attn_logit_softcapping": 1.5}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("cohere", {}),
        ("cohere2", {"num_hidden_layers": 5, "logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("hyperclovax", {"logits_scaling": 4.0}),
        ("nanochat", {}),
        ("stablelm", rope("default", partial_rotary_factor=0.5)),
        ("nemotron", {}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("gptj", {}),
        ("opt", {}),
        ("glm", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value)) or "plain",
)
def test_a_family_that_is_served_is_computed_as_transformers_does(
    model_type: str, changes: dict[str, Any], tmp_path
) -> None:
    verdict, what, differences = judge(save_random(small_config(model_type, **changes), tmp_path))
    assert (verdict, what) == ("right", ""), differences


@pytest.mark.parametrize(
    ("model_type", "changes", "why"),
    [
        ("bert", {"is_decoder": False}, r"log-probabilities of sequences packed .* differ"),
        ("jetmoe", {}, "adapters are for linear layers"),
        ("laguna", {}, "stock peft loads adapters on its shared experts under other names"),
        ("bloom", {}, "does not say how long a sequence may be"),
        ("rwkv", {}, "does not say how long a sequence may be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_family_that_would_be_computed_wrongly_is_refused_in_a_sentence(
    model_type: str, changes: dict[str, Any], why: str, tmp_path
) -> None:
    config = small_config(model_type, **changes)
    verdict, sentence, _ = judge(save_random(config, tmp_path))
    assert verdict == "refused"
    assert re.search(why, sentence), sentence
