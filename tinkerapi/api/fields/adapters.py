"""The fields that define an adapter's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.conf import settings

from tinkerapi.api.fields.field import Custom, Field, Flag
from tinkerapi.api.fields.refusals import is_above, refuse
from training.errors import InvalidRequest, LimitExceeded
from training.types import LoraConfig

_LORA = LoraConfig()


def check_rank(value: Any, where: str) -> int:
    """At least 1 and no more than the server's limit."""
    if is_above(value, settings.MAX_LORA_RANK):
        raise LimitExceeded(
            f"{where}: {value} is too large; this server takes up to {settings.MAX_LORA_RANK}"
        )
    if type(value) is not int or value < 1:
        raise refuse(where, "a whole number of at least 1", value)
    return value


def check_adapts_something(config: Mapping[str, Any], where: str = "") -> None:
    """Refuse an adapter without any layer."""
    if not (config["train_mlp"] or config["train_attn"] or config["train_unembed"]):
        raise InvalidRequest(
            f"{where}train_mlp, train_attn, train_unembed: at least one of them must be true"
        )


ADAPTER_FIELDS: Mapping[str, Field] = {
    "rank": Custom(
        description="Inner dimension of the LoRA matrices.",
        default=_LORA.rank,
        checker=check_rank,
        json={"type": "integer", "minimum": 1},
        example=16,
    ),
    "train_mlp": Flag(description="Adapt the MLP layers.", default=_LORA.train_mlp),
    "train_attn": Flag(description="Adapt the attention layers.", default=_LORA.train_attn),
    "train_unembed": Flag(description="Adapt the output head.", default=_LORA.train_unembed),
}
"""Fields of every dialect that makes adapters."""
