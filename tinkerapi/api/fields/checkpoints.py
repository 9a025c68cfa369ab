"""The fields of a save."""

from __future__ import annotations

from typing import Any

from tinkerapi.api.fields.field import Custom, Integer, Text
from tinkerapi.api.fields.refusals import refuse, refuse_size
from training.services.upkeep import MAX_TTL_SECONDS

MAX_METADATA_KEYS = 50


def check_user_metadata(value: Any, where: str) -> dict[str, str]:
    """An object with texts by name."""
    if not isinstance(value, dict):
        raise refuse(where, f"an object of up to {MAX_METADATA_KEYS} texts by name", value)
    if len(value) > MAX_METADATA_KEYS:
        raise refuse_size(where, len(value), "names", MAX_METADATA_KEYS)
    text = Text(description="", max_length=500)
    return {
        text.check(name, f"{where} (a name)"): text.check(item, f"{where}.{name[:60]}")
        for name, item in value.items()
    }


USER_METADATA = Custom(
    description="Texts by name, kept with it.",
    default={},
    checker=check_user_metadata,
    json={"type": "object", "additionalProperties": {"type": "string"}},
)
TTL_SECONDS = Integer(
    description="Seconds until it is deleted; absent, it is kept.",
    minimum=1,
    maximum=MAX_TTL_SECONDS,
)
