"""``adapter_config.json`` of a LoRA adapter: the fields that we compute, and no others.

Every field that peft knows is in one of these tables. A field that changes what the adapter
computes and that we do not compute is refused by its name, as is a field that only a later peft
knows, unless it is empty.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from training.errors import InvalidRequest

CONFIG_NAME = "adapter_config.json"

_NO_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",  # how a merge is written, not what is computed
        "inference_mode",
        "lora_dropout",  # of the training elsewhere; here nothing drops out
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
"""Fields that change nothing of what the adapter computes."""

_OWN_START = (True, False, "gaussian", "orthogonal", "eva", None)
"""The initial values that leave the base model as it is. With the others (``pissa``, ``olora``,
``loftq`` ...) the adapter belongs to a base model with other weights."""

_REFUSED = {
    "use_dora": "DoRA is not computed here",
    "bias": "biases are not trained here; expected 'none'",
    "lora_bias": "biases are not trained here",
    "modules_to_save": "modules that were trained as a whole are not kept here, only LoRA matrices",
    "trainable_token_indices": "rows of the embedding are not trained here",
    "layer_replication": "the base model's layers are not repeated here",
    "ensure_weight_tying": "an adapter of one layer is not shared with another here",
    "use_qalora": "QALoRA is not computed here",
    "use_bdlora": "block-diagonal LoRA is not computed here",
    "alora_invocation_tokens": "activated LoRA is not computed here",
}
"""Fields that change what is computed, and why they are refused."""


EXPERT_LAYERS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
"""The parameters of all experts of a layer of the model, and the linear layers in each."""


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The part of ``adapter_config.json`` that says what the adapter computes."""

    rank: int
    alpha: float
    is_rslora: bool = False
    """The update is scaled by alpha / sqrt(rank) instead of alpha / rank."""
    target_modules: str | tuple[str, ...]
    """A regular expression, ``all-linear``, or names and endings of names."""
    exclude_modules: str | tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    """Names, or endings of names, of parameters: those of experts, and weights of linear layers."""
    layers: frozenset[int] | None = None
    """Only layers of these numbers; None: all."""
    layers_patterns: tuple[str, ...] = ()
    """Regular expressions of what stands before a layer's number; (): anything."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Regular expression of a module's name -> its rank."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_model: str = ""
    """The base model that it was trained on, in its trainer's words."""

    def scale(self, rank: int, alpha: float) -> float:
        """The factor of the update of a module."""
        return alpha / math.sqrt(rank) if self.is_rslora else alpha / rank


def parse_peft_config(content: bytes) -> PeftConfig:
    """The configuration in the bytes of an ``adapter_config.json``.

    Raises:
        InvalidRequest: It is not a LoRA adapter of the kind that is computed here; the message
            names the field. (400)
    """
    try:
        values: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{CONFIG_NAME}: is not JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise InvalidRequest(f"{CONFIG_NAME}: expected a JSON object")
    if values.get("peft_type") != "LORA":
        raise _refusal("peft_type", f"expected 'LORA'; got {values.get('peft_type')!r}"[:200])
    for name, why in _REFUSED.items():
        if values.get(name) and not (name == "bias" and values[name] == "none"):
            raise _refusal(name, why)
    if values.get("init_lora_weights", True) not in _OWN_START:
        raise _refusal(
            "init_lora_weights",
            f"{values['init_lora_weights']!r:.60} changes the base model's weights; save the "
            "adapter with path_initial_model_for_weight_conversion, which makes it an ordinary one",
        )
    if values.get("eva_config") is not None:  # describes how it began, not what it computes
        values = {**values, "eva_config": None}
    config = PeftConfig(
        rank=_whole("r", values.get("r", 8)),
        alpha=_positive("lora_alpha", values.get("lora_alpha", 8)),
        is_rslora=bool(values.get("use_rslora")),
        target_modules=_modules("target_modules", values.get("target_modules")),
        exclude_modules=_modules("exclude_modules", values.get("exclude_modules")),
        target_parameters=_parameters(values.get("target_parameters")),
        layers=_layers(values.get("layers_to_transform")),
        layers_patterns=_texts("layers_pattern", values.get("layers_pattern")),
        rank_pattern=_pattern("rank_pattern", values.get("rank_pattern"), _whole),
        alpha_pattern=_pattern("alpha_pattern", values.get("alpha_pattern"), _positive),
        base_model=str(values.get("base_model_name_or_path") or "")[:400],
    )
    if not config.target_modules and not config.target_parameters:
        raise _refusal("target_modules", "names no module")
    for name in sorted(set(values) - _NO_EFFECT - set(_REFUSED) - _READ):
        if values[name]:
            raise _refusal(name, f"this field is not known here; got {values[name]!r}"[:200])
    return config


_READ = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "target_modules",
        "exclude_modules",
        "target_parameters",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
    }
)


def _refusal(name: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{CONFIG_NAME}: {name[:60]}: {why}")


def _whole(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 2**20:
        raise _refusal(name, f"expected a whole number of at least 1; got {value!r:.60}")
    return value


def _positive(name: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= 1e6:
        raise _refusal(name, f"expected a number above 0 and up to 1e6; got {value!r:.60}")
    return float(value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = [value] if value else []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _refusal(name, f"expected a text or a list of texts; got {value!r:.60}")
    return tuple(sorted(set(value)))


def _modules(name: str, value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _texts(name, value)


def _parameters(value: Any) -> tuple[str, ...]:
    names = _texts("target_parameters", value)
    for name in names:
        if name.rpartition(".")[2] not in (*EXPERT_LAYERS, "weight"):
            raise _refusal(
                "target_parameters",
                f"{name[:200]!r} is not computed here; expected {', '.join(EXPERT_LAYERS)} of "
                "experts, or the weight of a linear layer",
            )
    return names


def _layers(value: Any) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _refusal("layers_to_transform", f"expected numbers of layers; got {value!r:.60}")
    return frozenset(numbers)


def _pattern(name: str, value: Any, check: Any) -> dict[str, Any]:
    """The values by pattern, in the file's order: the first one that matches counts."""
    if not value:
        return {}
    if not isinstance(value, dict):
        raise _refusal(name, f"expected an object; got {value!r:.60}")
    return {key: check(f"{name}[{key[:60]!r}]", item) for key, item in value.items()}
