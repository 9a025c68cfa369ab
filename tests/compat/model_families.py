"""Every causal type of transformers, made tiny and random: right, refused, not made or not checked.

    python -m tests.compat.model_families [TYPE ...]

Writes ``model_families.json``. ``wrong`` may stand nowhere in it: that is what the proof at the
start is for. A few types cannot be made small by names of sizes alone; they say why.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.engine.families import judge, save_random, small_config
from tests.tiny_model import VOCAB_SIZE

RESULTS = Path(__file__).with_suffix(".json")
MAX_PARAMETERS = 30_000_000
NEEDED: dict[str, dict[str, Any]] = {
    "bloom": {"seq_length": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {"is_decoder": True},
    "stablelm": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
        }
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB_SIZE, "hidden_size_per_layer_input": 4},
    "zaya": {"num_experts_per_tok": 1},
}
"""Settings that some families need besides sizes."""


def verdict_of(model_type: str) -> dict[str, Any]:
    """``verdict``; ``why`` where it is not right; and the largest ``differences`` found."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = small_config(model_type, **NEEDED.get(model_type, {}))
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            num_parameters = sum(parameter.numel() for parameter in model.parameters())
            if num_parameters > MAX_PARAMETERS:
                return {"verdict": "not made", "why": f"{num_parameters:,} parameters"}
            save_random(config, Path(folder))
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            return {"verdict": "not made", "why": why}
        try:
            verdict, why, differences = judge(folder)
        except AttributeError as error:
            # peft takes some families for others, and their layers for those of the others.
            return {"verdict": "not checked", "why": f"stock peft leaves out a layer: {error}"}
        why = why.replace(folder, "It")
    answer: dict[str, Any] = {"verdict": verdict}
    if why:
        answer["why"] = why
    if differences:
        answer["differences"] = {name: float(f"{x:.1e}") for name, x in differences.items()}
    return answer


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    chosen = sys.argv[1:]
    known = json.loads(RESULTS.read_text())["families"] if chosen and RESULTS.exists() else {}
    families = dict(known)
    for model_type in chosen or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        families[model_type] = verdict_of(model_type)
        sys.stdout.write(f"{model_type}: {families[model_type]}\n")
    verdicts = [answer["verdict"] for answer in families.values()]
    results = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "counts": {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))},
        "families": dict(sorted(families.items())),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
