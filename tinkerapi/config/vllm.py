"""The ``[base_model.vllm]`` table of the configuration file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from django.core.exceptions import ImproperlyConfigured

from tinkerapi.config.unknown_keys import refuse_unknown
from training.base_model_config import LORA_RANKS, VllmConfig
from training.vllm_server import OUR_ARGUMENTS, OUR_VARIABLES

MOST_LORAS = 1024
MOST_SEQUENCES = 4096
MOST_WAIT_SECONDS = 86_400
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def vllm_from_table(table: Mapping[str, Any], where: str, folder: Path) -> VllmConfig:
    """Read the table.

    Args:
        where: The table, for messages.
        folder: The configuration file's folder; relative paths are relative to it.

    Raises:
        ImproperlyConfigured: A key or a value is invalid; the message names it.
    """
    refuse_unknown(table, [field.name for field in fields(VllmConfig)], where)
    for key in ("python", "address", "key_file"):
        if key in table and not (isinstance(table[key], str) and table[key].strip()):
            raise ImproperlyConfigured(f"{where}.{key}: expected a text, got {table[key]!r}")
    if ("python" in table) == ("address" in table):
        raise ImproperlyConfigured(
            f"{where}: expected either python, the Python of vLLM's own environment, or address, "
            "that of a server that runs elsewhere"
        )
    if "address" in table:
        _check_address(table, where)
    elif "key_file" in table:
        raise ImproperlyConfigured(
            f"{where}.key_file: expected only beside address; a server that is started here gets a "
            "new random key at each start"
        )
    return VllmConfig(
        python=_path(table.get("python", ""), folder),
        address=table.get("address", "").rstrip("/"),
        key_file=_path(table.get("key_file", ""), folder),
        arguments=_arguments(table.get("arguments", []), f"{where}.arguments"),
        environment=_environment(table.get("environment", {}), f"{where}.environment"),
        max_loras=_whole(table, "max_loras", 8, MOST_LORAS, where),
        max_lora_rank=_rank(table.get("max_lora_rank", 64), f"{where}.max_lora_rank"),
        max_sequences=_whole(table, "max_sequences", 256, MOST_SEQUENCES, where),
        wait_seconds=_whole(table, "wait_seconds", 120, MOST_WAIT_SECONDS, where),
    )


def _check_address(table: Mapping[str, Any], where: str) -> None:
    for key in ("arguments", "environment"):
        if key in table:
            raise ImproperlyConfigured(
                f"{where}.{key}: expected only beside python; a server that runs elsewhere has its "
                "own"
            )
    parts = urlsplit(table["address"])
    try:
        is_right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port is no number
        is_right = False
    if not is_right or parts.path.strip("/") or parts.query or parts.username:
        raise ImproperlyConfigured(
            f"{where}.address: expected http://HOST:PORT or https://HOST, got {table['address']!r}"
        )


def _path(value: str, folder: Path) -> str:
    """A path as it is valid in every working directory; links stay, because the Python of an
    environment is one."""
    if not value:
        return ""
    return str(folder.absolute() / Path(value).expanduser())


def _arguments(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise ImproperlyConfigured(f"{where}: expected a list of texts, got {value!r}")
    for part in value:
        name = part.partition("=")[0].replace("_", "-")
        if reason := OUR_ARGUMENTS.get(name):
            raise ImproperlyConfigured(f"{where}: {name} cannot be given: {reason}")
    return tuple(value)


def _environment(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict) or not all(
        isinstance(text, str) and _VARIABLE.fullmatch(name) for name, text in value.items()
    ):
        raise ImproperlyConfigured(
            f"{where}: expected a table of variables with texts, got {value!r}"
        )
    for name in value:
        if name in OUR_VARIABLES:
            raise ImproperlyConfigured(
                f"{where}.{name}: cannot be given, because tinkerapi sets it"
            )
    return tuple(sorted(value.items()))


def _whole(table: Mapping[str, Any], key: str, default: int, most: int, where: str) -> int:
    value = table.get(key, default)
    if type(value) is not int or not 1 <= value <= most:
        raise ImproperlyConfigured(f"{where}.{key}: expected 1 to {most}, got {value!r}")
    return value


def _rank(value: Any, where: str) -> int:
    """The smallest rank that vLLM permits and that is large enough."""
    if type(value) is not int or not 1 <= value <= LORA_RANKS[-1]:
        raise ImproperlyConfigured(f"{where}: expected 1 to {LORA_RANKS[-1]}, got {value!r}")
    return next(rank for rank in LORA_RANKS if rank >= value)
