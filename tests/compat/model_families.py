"""Every causal type of transformers, made tiny and random: right, refused, not made or not checked.

    python -m tests.compat.model_families [TYPE ...]

Writes ``model_families.json``, and ``tinkerapi/docs/models.md`` from it. ``wrong`` may stand
nowhere in it: that is what the proof at the start is for. A few types cannot be made small by names
of sizes alone; they say why.
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

from tests.compat.models_page import PAGE, models_page
from tests.compat.small_configs import small
from tests.engine.families import judge, save_random
from tests.engine.vision_families import CONFIGS, save_vision_model
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import load_base_model
from training.errors import BaseModelNotFound

RESULTS = Path(__file__).with_suffix(".json")
MAX_PARAMETERS = 60_000_000


def verdict_of(model_type: str) -> dict[str, Any]:
    """``verdict``; ``why`` where it is not right; how it is served; and the largest
    ``differences`` found."""
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = small(model_type)
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
            verdict, why, differences = judge(folder, note=lambda m: facts.update(served(m)))
        except AttributeError as error:
            # peft takes some families for others, and their layers for those of the others.
            why = f"stock peft leaves out a layer: {error}"
            return {"verdict": "not checked", **facts, "why": why}
        except ValueError as error:
            # peft finds modules by the ends of their names, and a head may be called `output`.
            why = f"stock peft takes another layer for one of these: {' '.join(str(error).split())}"
            return {"verdict": "not checked", **facts, "why": why[:200]}
        why = why.replace(folder, "It")
    answer: dict[str, Any] = {"verdict": verdict, **facts}
    if why:
        answer["why"] = why
    if differences:
        answer["differences"] = {name: float(f"{x:.1e}") for name, x in differences.items()}
    return answer


def served(base_model: BaseModel) -> dict[str, Any]:
    """How a model is served: its layout, and whether experts are adapted and images read."""
    experts = any(shape.num_experts for shape in base_model.linear_shapes.values())
    images = base_model.vision is not None
    return {"layout": base_model.info.layout, "experts": experts, "images": images}


def vision_verdict(model_type: str) -> dict[str, Any]:
    """How a model with a vision tower is served, or why not; ``test_vision_families`` compares."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            base_model = load_base_model(
                save_vision_model(model_type, Path(folder)), dtype="float32", device="cpu"
            )
        except BaseModelNotFound as error:
            return {"verdict": "refused", "why": str(error).replace(folder, "It")}
    answer = {"verdict": "served", **served(base_model)}
    return answer | ({"why": base_model.image_fault} if base_model.image_fault else {})


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
        "vision": {model_type: vision_verdict(model_type) for model_type in sorted(CONFIGS)},
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(models_page(results))


if __name__ == "__main__":
    main()
