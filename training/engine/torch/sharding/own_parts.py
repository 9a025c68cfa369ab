"""Loads this rank's part of a base model, and makes plain tensors of it.

transformers reads and shards the model by its own plan for the family. Of that only the weights
are kept when layers are split: our layers exchange what they need themselves (``split_layers``).
What the plan splits without need is whole on every rank: embeddings, output head, and layers whose
output is gathered at once. Families whose plan has anything else are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.pytorch_utils import Conv1D

from training.base_model_config import BaseModelConfig
from training.engine.torch.experts.lora_experts import LoraExperts
from training.engine.torch.experts.stacks import ExpertPart, ExpertStack, Projection
from training.engine.torch.lora_linear import LoraLinear
from training.engine.torch.packing.stream import ContextHolder
from training.engine.torch.sharding.rank_group import RankGroup
from training.engine.torch.sharding.split_layers import (
    ColumnSplitLinear,
    RepeatedLinear,
    RowSplitLinear,
    SplitExperts,
    own_part,
)
from training.errors import BaseModelNotFound

COLUMNS, ROWS = "colwise", "rowwise"
"""transformers' names for layers whose outputs, or inputs, are split."""

OF_EXPERTS = {"packed_colwise", "moe_tp_experts", "grouped_gemm", "ep_dispatch_experts"}

MADE_WHOLE = {
    "embedding_rowwise",
    "embedding_colwise",
    "colwise_gather_output",
    "colwise_rep",
    "rowwise_rep",
    "rowwise_split_input",
    "replicated_with_grad_allreduce",
    "replicate",
}
"""Styles whose input and output are the same on all ranks, as without any splitting, or which
change only the gradient of weights, which are frozen here."""


def require_plan(
    config: PreTrainedConfig, model_class: Any, *, name: str, sizes: BaseModelConfig
) -> None:
    """Refuse a family that cannot be sharded so, before its weights are read.

    Raises:
        BaseModelNotFound: The message says what is missing.
    """
    with torch.device("meta"):
        model: PreTrainedModel = model_class.from_config(config)
    text = config.get_text_config()
    kind = text.model_type
    if any(isinstance(module, Conv1D) for module in model.modules()):
        raise _refusal(name, sizes, f"the {kind} family stores its layers transposed")
    if sizes.fsdp_size > 1:
        return
    if not text.base_model_tp_plan:
        raise _refusal(name, sizes, f"transformers has no plan to split the {kind} family's layers")
    if sizes.ep_size > 1 and not text.base_model_ep_plan:
        raise _refusal(name, sizes, f"transformers has no plan to divide experts of {kind}")
    plan = model._resolve_parallel_plans(_distributed(model, sizes))
    styles = {**plan[0], **plan[1]}
    if unknown := sorted(set(styles.values()) - {COLUMNS, ROWS} - OF_EXPERTS - MADE_WHOLE):
        raise _refusal(name, sizes, f"the {kind} family's plan has the style {unknown[0]}")
    split = [
        (module_name, module)
        for module_name, module in model.named_modules()
        if isinstance(module, nn.Linear) and styles.get(module_name) in (COLUMNS, ROWS)
    ]
    if not split and sizes.ep_size == 1:
        raise _refusal(name, sizes, f"transformers' plan for the {kind} family splits no layer")
    for module_name, module in split:
        is_column = styles[module_name] == COLUMNS
        size = module.out_features if is_column else module.in_features
        what = f"the {'outputs' if is_column else 'inputs'} of {module_name}"
        _require_multiple(size, what, name, sizes)
    for field in ("num_attention_heads", "num_key_value_heads"):
        if split and isinstance(heads := getattr(text, field, None), int):
            _require_multiple(heads, field, name, sizes)


def _require_multiple(size: int, what: str, name: str, sizes: BaseModelConfig) -> None:
    if size % sizes.tp_size:
        raise _refusal(name, sizes, f"{what} are {size}, which is no multiple of {sizes.tp_size}")


def _refusal(name: str, sizes: BaseModelConfig, reason: str) -> BaseModelNotFound:
    asked = ", ".join(
        f"{field} {getattr(sizes, field)}"
        for field in ("tp_size", "fsdp_size", "ep_size")
        if getattr(sizes, field) > 1
    )
    return BaseModelNotFound(
        f"{name} cannot be served with {asked}: {reason}; choose other sizes or another base model."
    )


def _distributed(model: PreTrainedModel, sizes: BaseModelConfig) -> DistributedConfig:
    """transformers' configuration for these sizes.

    Norm and output head are sharded each by itself: transformers would treat them as one, and we
    never call the head's own forward.
    """
    fsdp_plan = None
    if sizes.fsdp_size > 1:
        tied = bool(getattr(model, "all_tied_weights_keys", None))
        alone = ("norm",) if tied else ("norm", "lm_head")
        fsdp_plan = {
            key: "free_full_weight" for key in model.fsdp_plan if key.split(".")[-1] in alone
        }
    return DistributedConfig(
        tp_size=sizes.tp_size,
        fsdp_size=sizes.fsdp_size,
        ep_size=sizes.ep_size,
        fsdp_plan=fsdp_plan,
    )


def distributed_config(
    config: PreTrainedConfig, model_class: Any, sizes: BaseModelConfig
) -> DistributedConfig:
    """What ``from_pretrained`` needs to load this rank's part."""
    with torch.device("meta"):
        model: PreTrainedModel = model_class.from_config(config)
    return _distributed(model, sizes)


def use_own_parts(
    model: PreTrainedModel,
    linears: Mapping[str, nn.Linear],
    stacks: Mapping[str, ExpertStack],
    holder: ContextHolder,
    group: RankGroup,
    *,
    name: str,
) -> None:
    """Put our layers in the place of the model's, and make its split tensors plain.

    Args:
        linears: The layers that can have adapters, by name.
        stacks: The experts, with the sizes of the whole model.
        name: The base model's.

    Raises:
        BaseModelNotFound: Experts cannot be divided so.
    """
    styles: dict[str, str] = {}
    if group.splits_layers:
        tp_plan, ep_plan, _ = model._resolve_parallel_plans(model.config.distributed_config)
        styles = tp_plan | ep_plan
        _use_plain_tensors(model, styles)
    else:
        _make_layers_take_part(model)
    for module_name, module in linears.items():
        match styles.get(module_name):
            case "colwise":
                ours: LoraLinear = ColumnSplitLinear(module, module_name, holder, group)
            case "rowwise":
                ours = RowSplitLinear(module, module_name, holder, group)
            case _ if group.splits_layers:
                ours = RepeatedLinear(module, module_name, holder, group)
            case _:
                ours = LoraLinear(module, module_name, holder)
        model.set_submodule(module_name, ours)
    for stack in stacks.values():
        if group.splits_layers:
            own = own_stack(stack, group, name=name)
            model.set_submodule(stack.name, SplitExperts(own, holder, group))
        else:
            model.set_submodule(stack.name, LoraExperts(stack, holder))


def _make_layers_take_part(model: PreTrainedModel) -> None:
    """Let all layers take part in every backward pass, whichever have an adapter: they collect
    their weights from all ranks, which must do that for the same layers in the same order."""

    def require_gradient(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() else output

    model.get_input_embeddings().register_forward_hook(require_gradient)


def _is_kept(module: nn.Module, name: str, parameter: DTensor, styles: Mapping[str, str]) -> bool:
    """Whether this rank computes with its part of a parameter."""
    if isinstance(module, nn.Linear):
        return styles.get(name.rpartition(".")[0]) in (COLUMNS, ROWS)
    return styles.get(name) in OF_EXPERTS or parameter.ndim == 3


def _use_plain_tensors(model: nn.Module, styles: Mapping[str, str]) -> None:
    """Replace sharded parameters by this rank's part or the whole, and transformers' exchanges by
    nothing."""
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module_name, module in model.named_modules():
        module.__dict__.pop("forward", None)
        for key, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in made:
                kept = _is_kept(module, f"{module_name}.{key}", parameter, styles)
                plain: Tensor = parameter.to_local() if kept else parameter.full_tensor()
                # In order and at an even address: kernels sum by both.
                own = plain.detach().clone(memory_format=torch.contiguous_format)
                made[id(parameter)] = nn.Parameter(own, requires_grad=False)
            setattr(module, key, made[id(parameter)])


def own_stack(stack: ExpertStack, group: RankGroup, *, name: str) -> ExpertStack:
    """This rank's part of a stack of experts.

    Raises:
        BaseModelNotFound: It cannot be divided so.
    """
    if group.splits_experts:
        size, what = stack.num_experts, "experts"
    else:
        size, what = stack.down.layers[0].shape.in_features, "inner features of an expert"
    is_odd = any(projection.bias is not None for projection in (stack.up, stack.down))
    is_odd |= any(layer.columns.step not in (None, 1) for layer in stack.up.layers)
    if size % group.size or (is_odd and not group.splits_experts):
        raise BaseModelNotFound(
            f"{name} cannot be served over {group.size} ranks: the {size} {what} of {stack.name}"
            " cannot be divided among them; choose other sizes."
        )
    part = own_part(size, group)
    if group.splits_experts:
        by_expert = ExpertPart(experts=part)
        return replace(
            stack,
            num_experts=size // group.size,
            up=_with_parts(stack.up, [by_expert] * len(stack.up.layers)),
            down=_with_parts(stack.down, [by_expert]),
        )
    each = size // group.size
    up = _with_parts(stack.up, [ExpertPart(outputs=part)] * len(stack.up.layers))
    layers = [
        replace(layer, columns=slice(number * each, (number + 1) * each))
        for number, layer in enumerate(up.layers)
    ]
    return replace(
        stack,
        up=replace(up, layers=tuple(layers)),
        down=_with_parts(stack.down, [ExpertPart(inputs=part)]),
    )


def _with_parts(projection: Projection, parts: list[ExpertPart]) -> Projection:
    layers = zip(projection.layers, parts, strict=True)
    return replace(projection, layers=tuple(replace(layer, part=part) for layer, part in layers))
