"""Loads a model folder as a base model, and refuses unsuitable folders.

Loading replaces every linear layer by a ``LoraLinear`` and attention by the packed one, and checks
that the results equal those of the unmodified model (``probe``). Folders whose parts would be
silently ignored or made up are refused: missing or quantized weights, layers that no adapter
reaches, another output head, another attention. Code in a folder is never run, and an attention
that its configuration requests is not used, since it may name code on a hub.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from training.base_model_config import PACKED, PADDED
from training.context_length import COMPUTED_ROTARY, COMPUTED_WINDOWS, usable_context_tokens
from training.engine.probe.few_layers import FewLayers
from training.engine.probe.images import StockImage, ask_stock_image, image_fault
from training.engine.probe.passes import Unproven
from training.engine.probe.proof import prove, stock_answers
from training.engine.probe.stock_answers import StockAnswers
from training.engine.renderer.images.reader import ImageReader
from training.engine.torch.base_model import BaseModel
from training.engine.torch.memory import keep_freed_memory
from training.engine.torch.our_layers import (
    require_known_layers,
    use_layout,
    use_linear_layers,
    wrap,
)
from training.engine.torch.rotary import rotary_switch_of
from training.engine.torch.sharding.own_parts import distributed_config, require_plan
from training.engine.torch.sharding.rank_group import RankGroup
from training.engine.torch.vision.loading import image_reader_of, model_class_of
from training.engine.torch.vision.tower import VisionTower
from training.errors import BaseModelNotFound
from training.model_folder import model_folder_problem

CACHE_LINE = 64  # bytes
NO_IMAGES_IN_GROUP = "a worker over several devices reads text only"


def _nobody(stage: str) -> None:
    """Report nothing."""


def load_base_model(
    path: str,
    *,
    name: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    layout: str = "auto",
    on_stage: Callable[[str], None] = _nobody,
    group: RankGroup | None = None,
) -> BaseModel:
    """Load a model folder (or hub name) and make it ready for adapters.

    On a CPU the process keeps its freed memory from then on.

    Args:
        path: A path or name for transformers' ``from_pretrained``.
        name: The name for clients; None: the path.
        device: ``auto`` takes the first GPU if there is one; else ``cpu`` or ``cuda``.
        dtype: ``auto`` is bfloat16 if the device computes it natively, else float32.
        layout: ``packed`` or ``padded``; ``auto`` is the first of the two that is proven.
        on_stage: Called with the name of each stage as it begins: ``read``, then ``prove``.
        group: The ranks over which to shard it; each loads its part. The first one also loads all
            of it for a moment, into the host's memory, for the check.

    Raises:
        BaseModelNotFound: The folder cannot be read or lacks weights, or has a model whose
            layers, output head or attention we do not compute correctly.
    """
    on_stage("read")
    _require_model_folder(path)
    torch_device = torch.device(_choose_device(device))
    torch_dtype = _choose_dtype(dtype, torch_device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        reader, no_reader = image_reader_of(path, config, tokenizer)
        if group is not None and (reader is not None or no_reader is not None):
            reader, no_reader = None, NO_IMAGES_IN_GROUP
        model_class = model_class_of(config, reader)
        sharding, stock = None, None
        if group is not None:
            require_plan(config, model_class, name=name or path, sizes=group.sizes)
            stock = group.of_first(
                lambda: _answers_of_whole(path, config, model_class, torch_dtype, name or path)
            ).on(torch_device)
            sharding = distributed_config(config, model_class, group.sizes)
        model, loaded = _load(path, config, model_class, torch_dtype, sharding)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise BaseModelNotFound(f"No model can be read from {path}: {first_line}") from error
    _require_all_weights(path, loaded)
    if group is None:
        nn.Module.to(model, device=torch_device)  # transformers' override has lost its signature
        if torch_device.type == "cpu":
            _align(model)
    model.eval().requires_grad_(False)
    on_stage("prove")
    base_model = _proven(model, tokenizer, name or path, layout, reader, stock, group)
    if no_reader is not None:
        base_model = replace(base_model, image_fault=no_reader)
    if torch_device.type == "cpu":
        keep_freed_memory()
    return base_model


def _align(model: nn.Module) -> None:
    """Copy weights that do not begin at a cache line: a safetensors file puts them anywhere, and a
    CPU takes a sixth longer to read such a matrix."""
    for weight in model.parameters():
        if weight.data_ptr() % CACHE_LINE:
            weight.data = weight.data.clone()


def _require_model_folder(path: str) -> None:
    """Refuse a folder that cannot be loaded as it is, and a wrong local path, which transformers
    would take for a hub name."""
    folder = Path(path)
    if folder.exists() or folder.is_absolute() or path.startswith("."):
        try:
            problem = model_folder_problem(folder)
        except OSError as error:
            problem = f"{error.filename} cannot be read: {error.strerror}"
        if problem:
            raise BaseModelNotFound(f"{problem[0].upper()}{problem[1:]}.")


def _load(
    path: str,
    config: PreTrainedConfig,
    model_class: Any,
    dtype: torch.dtype,
    sharding: DistributedConfig | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, or this rank's part of it, and transformers' report about its weights."""
    # transformers' own choice: a configuration may name kernels on a hub, which would be run.
    config._attn_implementation = None
    loaded: Any = model_class.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **({} if sharding is None else {"distributed_config": sharding}),
    )  # typed as the model alone
    model, info = loaded
    return model, info


def _require_all_weights(path: str, loaded: Mapping[str, Any]) -> None:
    """Refuse missing or misshapen weights, which transformers initializes at random and only
    logs."""
    wrong = {str(key) for key in loaded["missing_keys"]}
    wrong |= {str(key) for key, *_ in loaded["mismatched_keys"]}
    if wrong:
        first, *others = sorted(wrong)
        more = f" and {len(others)} more" if others else ""
        raise BaseModelNotFound(
            f"{path} is not a complete causal language model: its files lack {first}{more}, or"
            " have it in another shape."
        )


def _answers_of_whole(
    path: str, config: PreTrainedConfig, model_class: Any, dtype: torch.dtype, name: str
) -> StockAnswers:
    """The unsharded model's results, computed on the CPU.

    Raises:
        BaseModelNotFound: It cannot be served.
    """
    model, loaded = _load(path, copy.deepcopy(config), model_class, dtype)
    _require_all_weights(path, loaded)
    model.eval().requires_grad_(False)
    return _ask(model, _checked(model, name), name, may_widen=False)


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """Properties of a model that may be served."""

    head: nn.Linear
    context_tokens: int
    computed_rotary: tuple[str, ...]
    rotary_switch: int | None


def _checked(model: PreTrainedModel, name: str) -> _Checked:
    """Check the parts of a model and its context.

    Raises:
        BaseModelNotFound: It cannot be served.
    """
    config = model.config.get_text_config()
    switch = rotary_switch_of(model)
    computed_rotary = () if switch is None else COMPUTED_ROTARY
    context_tokens = usable_context_tokens(
        config.to_dict(), computed=(*COMPUTED_WINDOWS, *computed_rotary)
    )
    if context_tokens is None:
        raise BaseModelNotFound(
            f"{name} cannot be served: its config.json does not say how long a sequence may be;"
            " add max_position_embeddings."
        )
    use_linear_layers(model)
    require_known_layers(model, name)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise BaseModelNotFound(f"{name} has no linear output head.")
    return _Checked(
        head=head,
        context_tokens=context_tokens,
        computed_rotary=tuple(computed_rotary),
        rotary_switch=switch,
    )


def _ask(
    model: PreTrainedModel, checked: _Checked, name: str, *, may_widen: bool = True
) -> StockAnswers:
    return stock_answers(
        model,
        name=name,
        vocab_size=checked.head.out_features,
        context_tokens=checked.context_tokens,
        may_widen=may_widen,
    )


def _proven(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    layout: str,
    reader: ImageReader | None,
    stock: StockAnswers | None = None,
    group: RankGroup | None = None,
) -> BaseModel:
    """The model with our layers, in a layout that computes the same results.

    Args:
        stock: The whole model's results, if this one is sharded over ``group``.

    Raises:
        BaseModelNotFound: The results differ.
    """
    config = model.config.get_text_config()
    checked = _checked(model, name)
    head, context_tokens, switch = checked.head, checked.context_tokens, checked.rotary_switch
    if stock is None:
        stock = _ask(model, checked, name)
    else:
        stock = replace(stock, few_layers=FewLayers(model, may_widen=False))
    if not stock.crosses_windows:
        within = usable_context_tokens(config.to_dict(), computed=checked.computed_rotary)
        context_tokens = context_tokens if within is None else within
    image = None
    if reader is not None:
        image = ask_stock_image(
            model, reader, vocab_size=head.out_features, context_tokens=context_tokens
        )
    wrapped = wrap(
        model, tokenizer, name, head, context_tokens, stock, rotary_switch=switch, group=group
    )
    reasons = {}
    for each in (PACKED, PADDED) if layout == "auto" else (layout,):
        laid_out = use_layout(model, wrapped, each)
        try:
            proven = prove(laid_out, stock, num_layers=config.num_hidden_layers)
            return proven if image is None else _with_images(model, proven, stock, reader, image)
        except Unproven as error:
            reasons[each] = str(error)
    raise BaseModelNotFound(_refusal(name, reasons, wrapped.dtype))


def _with_images(
    model: PreTrainedModel,
    base_model: BaseModel,
    stock: StockAnswers,
    reader: ImageReader | None,
    image: StockImage | str,
) -> BaseModel:
    """The base model with its vision tower; or the reason why it reads text only."""
    if reader is None or isinstance(image, str):
        return replace(base_model, image_fault=str(image))
    seeing = replace(base_model, vision=VisionTower(model, reader))
    num_layers = model.config.get_text_config().num_hidden_layers
    fault = image_fault(seeing, stock, image, num_layers=num_layers)
    return seeing if fault is None else replace(base_model, image_fault=fault)


def _refusal(name: str, reasons: Mapping[str, str], dtype: torch.dtype) -> str:
    """The sentence about a model that no layout of ``reasons`` computes."""
    what = "; and ".join(f"{layout}, {reason}" for layout, reason in reasons.items())
    others = ["choose another base model"]
    if dtype != torch.float32:
        others.append("TINKERAPI_DTYPE=float32")
    if len(reasons) == 1:
        others.append("the layout auto")
    return (
        f"{name} cannot be served: {what}. Its family needs something that this server does not"
        f" compute; {' or '.join(others)}."
    )


def _choose_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """bfloat16 only if the hardware supports it; emulated it is slower than float32."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32
