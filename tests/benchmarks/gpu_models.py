"""Random-weight models for the GPU benchmark, made from their configurations on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.tiny_model import make_tokenizer
from training.base_model_config import PACKED
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import _proven


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a published model."""

    name: str
    family: str
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocab: int
    tied: bool
    head_size: int = 128
    context: int = 32_768


LARGE = (
    Shape(
        name="Llama 3.2 1B",
        family="llama",
        hidden=2048,
        inner=8192,
        layers=16,
        heads=32,
        key_heads=8,
        vocab=128_256,
        tied=True,
        head_size=64,
    ),
    Shape(
        name="Qwen3 1.7B",
        family="qwen3",
        hidden=2048,
        inner=6144,
        layers=28,
        heads=16,
        key_heads=8,
        vocab=151_936,
        tied=True,
    ),
    Shape(
        name="Llama 3.1 8B",
        family="llama",
        hidden=4096,
        inner=14_336,
        layers=32,
        heads=32,
        key_heads=8,
        vocab=128_256,
        tied=False,
    ),
    Shape(
        name="Qwen3 8B",
        family="qwen3",
        hidden=4096,
        inner=12_288,
        layers=36,
        heads=32,
        key_heads=8,
        vocab=151_936,
        tied=False,
    ),
)

SMALL = tuple(
    Shape(
        name=f"small {family}",
        family=family,
        hidden=64,
        inner=128,
        layers=2,
        heads=4,
        key_heads=2,
        vocab=512,
        tied=True,
        head_size=16,
        context=4096,
    )
    for family in ("llama", "qwen3")
)
"""To try the benchmark itself."""


def make(shape: Shape, device: str, dtype: torch.dtype) -> BaseModel:
    """A base model of this shape, checked at its start as a loaded one is."""
    sizes: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.context,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    config = CONFIG_MAPPING[shape.family](**sizes)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    return _proven(model, make_tokenizer(), shape.name, PACKED, None)
