"""An adapter as files in peft's format, for others.

peft is imported with this module, not with the engine: it takes 9 MB, and a worker that exports
nothing needs none of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

from training.atomic_directory import new_directory
from training.engine.export_readme import export_readme
from training.engine.torch.adapters import Adapter
from training.engine.torch.checkpoint_io import write_tensors
from training.engine.torch.experts.peft_form import PeftExperts, peft_experts
from training.engine.torch.experts.stacks import ExpertStack
from training.engine.torch.experts.tinker_form import tinker_experts

TINKER_NAME = "tinker_adapter.safetensors"
"""In an export with experts: the same adapter as tools for the hosted service's adapters read it.
The folder's README says how."""


def save_peft(
    adapter: Adapter,
    directory: Path,
    *,
    base_model_name: str,
    head_name: str,
    model_type: str,
    stacks: Mapping[str, ExpertStack],
) -> int:
    """Write files for ``peft.PeftModel.from_pretrained``; see ``Trainer.save_peft``.

    Beside them it writes a README.md for people: how to load the adapter and, if it has the output
    head, how to merge it.
    """
    layout = adapter.layout
    experts = peft_experts(layout, adapter.weights.flat, stacks)
    modules = [name for name, place in layout.places.items() if not place.shape.num_experts]
    as_modules, as_parameters = split_targets(modules, model_type)
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        base_model_name_or_path=base_model_name,
        inference_mode=True,
        r=layout.rank,
        lora_alpha=layout.config.alpha,  # type: ignore[arg-type]  # peft divides it as any number
        target_modules=as_modules,
        **_parameter_arguments(experts, as_parameters),
    )
    linears = {}
    for name in modules:
        a, b = layout.pair(adapter.weights.flat, name)
        linears[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        linears[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    with new_directory(directory) as temporary:
        write_tensors(temporary / "adapter_model.safetensors", linears | experts.tensors)
        if layout.has_experts:
            own = tinker_experts(layout, adapter.weights.flat, stacks)
            write_tensors(temporary / TINKER_NAME, linears | own)
        config.save_pretrained(str(temporary))
        readme = export_readme(
            base_model_name, layout, head_name if head_name in layout.places else None
        )
        (temporary / "README.md").write_text(readme)
        return sum(path.stat().st_size for path in temporary.iterdir())


def _parameter_arguments(experts: PeftExperts, others: Sequence[str]) -> dict[str, Any]:
    """peft's arguments for what it adapts as parameters; none without any."""
    if not experts.target_parameters and not others:
        return {}
    return {
        "target_parameters": [*experts.target_parameters, *others],
        "rank_pattern": experts.ranks,
        "alpha_pattern": experts.alphas,
    }


def split_targets(modules: Sequence[str], model_type: str) -> tuple[list[str], list[str]]:
    """The linear layers for peft's ``target_modules``, and the parameters of the others for its
    ``target_parameters``.

    In some families of experts peft takes every target that ends in ``gate_proj`` and so on for the
    experts', which had these names once, and leaves out a dense layer or a shared expert of that
    name. As a parameter such a layer gets the same adapter under the same name.
    """
    taken = {
        leaf: _is_taken_for_experts(leaf, model_type)
        for leaf in {name.rpartition(".")[2] for name in modules}
    }
    as_parameters = [name for name in modules if taken[name.rpartition(".")[2]]]
    return (
        [name for name in modules if not taken[name.rpartition(".")[2]]],
        [f"{name}.weight" for name in as_parameters],
    )


def _is_taken_for_experts(leaf: str, model_type: str) -> bool:
    """Whether the installed peft changes a target of this name when it adapts such a model."""
    config = peft.LoraConfig(target_modules=[leaf])
    model: Any = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # it wants gate and up together
        return True
    return leaf not in (config.target_modules or ())
