"""How much CPU time a forward_backward of a hybrid model takes: our padded layout against peft.

The model is a random Qwen3.5 of 6 layers of 256, four of them with a recurrent state. Each run of
one side is followed by a run of the other; medians of CPU seconds of one thread are compared, after
losses and gradients were checked to be equal (``packed_vs_peft``). peft pads each adapter's datums
to the longest and runs one adapter after another, since it refuses a mixed batch in training.

    python -m tests.benchmarks.padded_vs_peft [--runs 3]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.benchmarks.packed_vs_peft import Workload, compare, store
from tests.tiny_model import VOCAB_SIZE, make_tokenizer

RESULTS = Path(__file__).parent / "results" / "padded_vs_peft.json"
RAGGED = (128, 64, 48, 32, 24, 16, 12, 8)
WORKLOADS = (
    Workload("ragged, one adapter", (RAGGED,)),
    Workload("ragged, long, one adapter", (tuple(4 * n for n in RAGGED),)),
    Workload("8 x 64, one adapter", ((64,) * 8,)),
    Workload("8 adapters, ragged each", (RAGGED,) * 8),
    Workload("8 adapters x 16 tokens", ((16,),) * 8),
)


def save_model(folder: Path) -> None:
    """A model large enough that its matrix products count."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["qwen3_5_text"](
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
        },
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        save_model(Path(name))
        for workload in WORKLOADS:
            row = compare(name, "float32", workload, options.runs)
            rows.append({key.replace("packed", "padded"): value for key, value in row.items()})
            print(rows[-1], flush=True)
            store(rows, options.runs, RESULTS)


if __name__ == "__main__":
    main()
