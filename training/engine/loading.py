"""How a model folder becomes a base model, and which folders are refused.

Loading replaces every linear layer by a ``LoraLinear`` and attention by the packed one, then
compares both with the untouched model on a few tokens. What we would silently leave out or make
up is refused: weights that the folder lacks, layers that no adapter reaches, a scaled or capped
output head, another attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from training.engine.adapters import LoraShape
from training.engine.attention import ATTENTION_NAME, SequenceAttention, UnsupportedAttention
from training.engine.base_model import BaseModel
from training.engine.interface import BaseModelInfo
from training.engine.lora import LoraLinear
from training.engine.memory import keep_freed_memory
from training.engine.packed import ContextHolder, PackedContext, uniform_segments
from training.engine.stretches import whole_sequences
from training.errors import BaseModelNotFound

PROBE_TOKENS = 8
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""Largest mean difference of log-probabilities that rounding explains, in nats. Both sides use
torch's fused attention where the model can, so that they agree far better than this."""


def load_base_model(
    path: str, *, name: str | None = None, device: str = "auto", dtype: str = "auto"
) -> BaseModel:
    """Load a model folder (or hub name) and make it ready for adapters.

    On a CPU the process keeps its freed memory from then on.

    Args:
        path: What transformers' ``from_pretrained`` takes.
        name: What clients call it; the path if None.
        device: ``auto`` takes the first GPU if there is one; else ``cpu`` or ``cuda``.
        dtype: ``auto`` is bfloat16 where the device computes it natively, else float32.

    Raises:
        BaseModelNotFound: The folder cannot be read or lacks weights, or holds a model whose
            layers, output head or attention we do not compute as it does.
    """
    _require_model_folder(path)
    torch_device = torch.device(_choose_device(device))
    torch_dtype = _choose_dtype(dtype, torch_device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model, loaded = _load(path, torch_dtype)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise BaseModelNotFound(f"No model can be read from {path}: {first_line}") from error
    _require_all_weights(path, loaded)
    nn.Module.to(model, device=torch_device)  # transformers' override has lost its signature
    model.eval().requires_grad_(False)
    expected = _probe_stock(model)
    base_model = _wrap(model, tokenizer, name or path)
    _check_probe(base_model, expected)
    if torch_device.type == "cpu":
        keep_freed_memory()
    return base_model


def _require_model_folder(path: str) -> None:
    """Say what is wrong with a local path; transformers would take it for a hub name."""
    directory = Path(path)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise BaseModelNotFound(f"{path} is not a model folder: it has no config.json.")
    elif directory.is_absolute() or path.startswith("."):
        raise BaseModelNotFound(f"There is no model folder at {path}.")


def _load(path: str, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and what transformers says of its weights."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
    )  # typed as the model alone
    model, info = loaded
    return model, info


def _require_all_weights(path: str, loaded: Mapping[str, Any]) -> None:
    """transformers draws at random what it does not find or what does not fit, and logs that."""
    wrong = {str(key) for key in loaded["missing_keys"]}
    wrong |= {str(key) for key, *_ in loaded["mismatched_keys"]}
    if wrong:
        first, *others = sorted(wrong)
        more = f" and {len(others)} more" if others else ""
        raise BaseModelNotFound(
            f"{path} is not a complete causal language model: its files lack {first}{more}, or"
            " have it in another shape."
        )


def _require_known_layers(model: PreTrainedModel, name: str) -> None:
    """Refuse matrices that no adapter could reach: training would leave them out silently."""
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            continue
        if any(parameter.ndim > 1 for parameter in module.parameters(recurse=False)):
            raise BaseModelNotFound(
                f"{name} cannot be served: its layer {module_name} is a {type(module).__name__},"
                " and adapters are for linear layers."
            )


def _wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> BaseModel:
    _require_known_layers(model, name)
    num_parameters = model.num_parameters()
    model.set_attn_implementation(ATTENTION_NAME)
    holder = ContextHolder()
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise BaseModelNotFound(f"{name} has no linear output head.")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    head_name = next(n for n, module in linears.items() if module is head)
    del linears[head_name]
    for module_name, module in linears.items():
        parent, _, child = module_name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraLinear(module, module_name, holder))
    linears[head_name] = head
    return BaseModel(
        info=BaseModelInfo(
            name=name,
            vocab_size=head.out_features,
            max_context_tokens=_context_tokens(model),
            num_parameters=num_parameters,
            device=head.weight.device.type,
            dtype=str(head.weight.dtype).removeprefix("torch."),
        ),
        tokenizer=tokenizer,
        device=head.weight.device,
        dtype=head.weight.dtype,
        end_token_ids=_end_token_ids(model),
        head_name=head_name,
        head_weight=head.weight,
        head_bias=head.bias,
        linear_shapes={n: LoraShape(m.in_features, m.out_features) for n, m in linears.items()},
        _decoder=model.get_decoder(),
        _holder=holder,
    )


def _end_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    configured = model.generation_config.eos_token_id
    if configured is None:
        return ()
    return tuple(configured) if isinstance(configured, list) else (int(configured),)


def _context_tokens(model: PreTrainedModel) -> int:
    """The longest sequence for which full attention is what the model was trained with."""
    config = model.config.get_text_config()
    limits = [config.max_position_embeddings]
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        limits.append(window)
    return int(min(limits))


def _probe_tokens(vocab_size: int, device: torch.device) -> Tensor:
    """Spread over the vocabulary: special tokens alone make bfloat16 models very noisy."""
    return torch.arange(1, PROBE_TOKENS + 1, device=device) * (vocab_size // (PROBE_TOKENS + 1))


@torch.no_grad()
def _probe_stock(model: PreTrainedModel) -> Tensor:
    """(PROBE_TOKENS, V) float32 log-probabilities of the model as transformers computes it."""
    tokens = _probe_tokens(model.config.get_text_config().vocab_size, model.device)
    logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


@torch.no_grad()
def _check_probe(base_model: BaseModel, expected: Tensor) -> None:
    tokens = _probe_tokens(base_model.info.vocab_size, base_model.device)
    segments = uniform_segments(PROBE_TOKENS, None)
    context = PackedContext(
        segments=segments, attention=SequenceAttention(whole_sequences([PROBE_TOKENS]))
    )
    position_ids = torch.arange(PROBE_TOKENS, device=base_model.device)
    try:
        hidden = base_model.hidden_states(tokens, position_ids, context)
    except UnsupportedAttention as error:
        raise BaseModelNotFound(f"{base_model.info.name} cannot be served: {error}") from error
    got = base_model.logits(hidden, segments).log_softmax(-1)
    difference = (got - expected).abs().mean().item()
    if not difference <= PROBE_TOLERANCE.get(base_model.dtype, 0.2):
        raise BaseModelNotFound(
            f"{base_model.info.name} cannot be served: its packed log-probabilities differ from"
            f" its own by {difference:.3g} nats, so some part of it is not supported."
        )


def _choose_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """bfloat16 only where the hardware multiplies it; emulated it is slower than float32."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32
