"""Replaces a loaded model's layers by ours, and prepares it for a layout.

Layers that no adapter could reach are refused, because training would silently ignore them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from training.base_model_config import PACKED
from training.engine.interface import BaseModelInfo
from training.engine.probe.called_layers import general_name
from training.engine.probe.stock_answers import StockAnswers
from training.engine.torch.adapters import LoraShape
from training.engine.torch.attention.backend import ATTENTION_NAME, prepare_layers
from training.engine.torch.base_model import BaseModel
from training.engine.torch.experts.llama4 import ask_chosen_experts
from training.engine.torch.experts.lora_experts import LoraExperts
from training.engine.torch.experts.peft_form import RENAMED_BY_PEFT
from training.engine.torch.experts.routers import find_routers, route_by_segment
from training.engine.torch.experts.stacks import ExpertStack, find_stacks
from training.engine.torch.lora_linear import LoraLinear
from training.engine.torch.packing.stream import ContextHolder
from training.engine.torch.padded.even_products import use_even_products
from training.engine.torch.padded.step_limits import limit_single_steps
from training.engine.torch.recompute import recompute_on_request
from training.engine.torch.rotary import follow_lengths, follow_the_pass
from training.engine.torch.sharding.own_parts import use_own_parts
from training.engine.torch.sharding.rank_group import RankGroup
from training.engine.torch.sharding.whole import whole
from training.engine.torch.target_modules import can_have_adapter
from training.errors import BaseModelNotFound


def use_linear_layers(model: PreTrainedModel) -> None:
    """Replace GPT-2's layers, which have a linear layer's matrix transposed, by linear layers."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, Conv1D):
            continue
        linear = nn.Linear(module.nx, module.nf, device="meta")
        linear.weight = nn.Parameter(module.weight.data.T.contiguous(), requires_grad=False)
        linear.bias = module.bias
        model.set_submodule(name, linear)


DECAY = "A_log"
"""The name of a state space's decay, which may be a matrix."""


def require_known_layers(model: PreTrainedModel, name: str) -> None:
    """Refuse matrices that no adapter could reach: training would silently ignore them.

    Convolutions, routers and the decays of state spaces are no such matrices: they stay frozen,
    as stock peft leaves them.
    """
    if model.config.model_type in RENAMED_BY_PEFT:
        raise BaseModelNotFound(
            f"{name} cannot be served: stock peft loads adapters on its shared experts under other"
            " names, so an export would lack them; choose another base model."
        )
    stacks = find_stacks(model)
    routers = find_routers(model, stacks)
    frozen = {*stacks, *routers}
    for name_of_router, router in routers.items():
        frozen |= {below for below, _ in router.named_modules(prefix=name_of_router)}
    known = nn.Linear | nn.Embedding | nn.modules.conv._ConvNd
    language = set(_language_of(model).modules())
    for module_name, module in model.named_modules():
        if module not in language or isinstance(module, known) or module_name in frozen:
            continue
        parameters = module.named_parameters(recurse=False)
        if any(parameter.ndim > 1 and key != DECAY for key, parameter in parameters):
            raise BaseModelNotFound(
                f"{name} cannot be served: its layer {module_name} is a {type(module).__name__},"
                " and adapters are for linear layers."
            )


def use_layout(model: PreTrainedModel, base_model: BaseModel, layout: str) -> BaseModel:
    """Prepare the model, which may have been prepared for another layout before, for one."""
    info = replace(base_model.info, layout=layout)
    switch = base_model.rotary_switch
    language = _language_of(model)
    if layout == PACKED:
        language.set_attn_implementation(ATTENTION_NAME)
        prepare_layers(language, model.config.get_text_config(), base_model.holder)
        if switch is not None:
            follow_lengths(model, base_model.holder, switch)
        return replace(base_model, info=info)
    language.set_attn_implementation(base_model.stock_attention)
    follow_the_pass(model)
    limit_single_steps(model)
    if base_model.device.type == "cpu":
        use_even_products()
    if switch is not None:
        # Beyond it a sequence that is sampled would have to be read again at one token.
        info = replace(info, max_context_tokens=min(info.max_context_tokens, switch))
    return replace(base_model, info=info)


def wrap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    head: nn.Linear,
    context_tokens: int,
    stock: StockAnswers,
    *,
    rotary_switch: int | None,
    group: RankGroup | None = None,
) -> BaseModel:
    """The model with our layers.

    Args:
        name: For clients.
        group: The ranks over which it is sharded; None: all of it is here.
    """
    num_parameters = model.num_parameters()
    holder = ContextHolder()
    stacks = find_stacks(model)
    routers = find_routers(model, stacks)
    model_type = model.config.get_text_config().model_type

    def is_adaptable(name: str) -> bool:
        is_used = general_name(name) in stock.called
        return is_used and name not in routers and can_have_adapter(name, model_type)

    linears = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and (m is head or is_adaptable(n))
    }
    head_name = next(n for n, module in linears.items() if module is head)
    shapes = _shapes_of(model, linears, stacks, head_name)
    del linears[head_name]
    if group is None:
        for module_name, module in linears.items():
            model.set_submodule(module_name, LoraLinear(module, module_name, holder))
        for stack in stacks.values():
            model.set_submodule(stack.name, LoraExperts(stack, holder))
    else:
        use_own_parts(model, linears, stacks, holder, group, name=name)
    head_weight = whole(head.weight)
    head_bias = None if head.bias is None else whole(head.bias)
    ask_chosen_experts(model)
    route_by_segment(model, routers, holder)
    decoder = _decoder_of(model)
    can_recompute = recompute_on_request(decoder, holder)
    return BaseModel(
        info=BaseModelInfo(
            name=name,
            vocab_size=head.out_features,
            max_context_tokens=context_tokens,
            num_parameters=num_parameters,
            device=head_weight.device.type,
            dtype=str(head_weight.dtype).removeprefix("torch."),
            rotary_switch=rotary_switch,
        ),
        tokenizer=tokenizer,
        device=head_weight.device,
        dtype=head_weight.dtype,
        end_token_ids=_end_token_ids(model),
        model_type=model.config.model_type,
        head_name=head_name,
        head_weight=head_weight,
        head_bias=head_bias,
        logit_shape=stock.logit_shape,
        rotary_switch=rotary_switch,
        linear_shapes=shapes,
        expert_stacks=stacks,
        stock_attention=model.config.get_text_config()._attn_implementation,
        holder=holder,
        can_recompute=can_recompute,
        _decoder=decoder,
        group=group,
    )


def _shapes_of(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    stacks: Mapping[str, ExpertStack],
    head_name: str,
) -> dict[str, LoraShape]:
    """Every linear layer, those of experts too, in the model's order, the head last."""
    shapes: dict[str, LoraShape] = {}
    for name, _ in model.named_modules():
        if name in linears and name != head_name:
            shapes[name] = LoraShape(linears[name].in_features, linears[name].out_features)
        if name in stacks:
            shapes |= {layer.name: layer.shape for layer in stacks[name].layers}
    head = linears[head_name]
    return {**shapes, head_name: LoraShape(head.in_features, head.out_features)}


def _language_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that reads tokens: without a vision tower, the whole model."""
    if getattr(model.config, "vision_config", None) is None:
        return model
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model


def _decoder_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head; some families return the whole model instead."""
    decoder: nn.Module = model.get_decoder()
    return model.get_submodule("model") if decoder is model else decoder


def _end_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    configured = model.generation_config.eos_token_id
    if configured is None:
        return ()
    return tuple(configured) if isinstance(configured, list) else (int(configured),)
