"""The longest sequence that is computed correctly, by the model's configuration."""

from __future__ import annotations

from typing import Any

import pytest

from training.context_length import usable_context_tokens

LONG = {"max_position_embeddings": 131_072}
LONGROPE = {
    **LONG,
    "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4096},
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LONG, 131_072),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 32, "window_size": 8}}, 8),
        ({}, None),
        ({"max_position_embeddings": "long"}, None),
        # Attention that does not see everything, as we compute it.
        ({**LONG, "sliding_window": 4096}, 131_072),
        ({**LONG, "attention_chunk_size": 8192}, 131_072),
        # And as we do not.
        ({**LONG, "window_size": 256}, 256),
        ({**LONG, "attention_window": [512, 256]}, 256),
        # What only sounds like it.
        ({**LONG, "max_window_layers": 28, "sliding_window_pattern": 6}, 131_072),
        ({**LONG, "chunk_size_feed_forward": 0}, 131_072),
        ({**LONG, "chunk_size": 256}, 131_072),
        ({**LONG, "mamba_chunk_size": 256}, 131_072),
        # A recurrent model without positions; with them, they count.
        ({"model_type": "mamba"}, 131_072),
        ({"model_type": "mamba", "max_position_embeddings": 2048}, 2048),
        ({"model_max_length": 1_048_576}, 1_048_576),
        # Rotary factors that are others for long sequences.
        (LONGROPE, 131_072),
        (
            {
                **LONG,
                "rope_scaling": {"type": "dynamic"},
                "original_max_position_embeddings": 4096,
            },
            4096,
        ),
        (
            {
                **LONG,
                "rope_parameters": {
                    "full_attention": {
                        "rope_type": "dynamic",
                        "original_max_position_embeddings": 2048,
                    },
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            2048,
        ),
        # Factors that are the same for all.
        (
            {
                **LONG,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "original_max_position_embeddings": 8192,
                },
            },
            131_072,
        ),
        ({**LONG, "rope_scaling": {"type": "linear", "factor": 4.0}}, 131_072),
        ({**LONG, "rope_scaling": None}, 131_072),
    ],
)
def test_it_ends_where_the_model_would_compute_otherwise(
    config: dict[str, Any], expected: int | None
) -> None:
    assert usable_context_tokens(config) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({**LONG, "sliding_window": 4096}, 4096),
        ({**LONG, "sliding_window": None}, 131_072),
        ({**LONG, "sliding_window": 4096, "use_sliding_window": False}, 131_072),
        ({**LONG, "attention_chunk_size": 8192}, 8192),
        (LONGROPE, 4096),
    ],
)
def test_a_switch_that_is_not_computed_is_a_limit(
    config: dict[str, Any], expected: int | None
) -> None:
    assert usable_context_tokens(config, computed=()) == expected
