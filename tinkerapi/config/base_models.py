"""The operator's base models: from TINKERAPI_BASE_MODEL, or tables of a TOML file."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from django.core.exceptions import ImproperlyConfigured

from tinkerapi.config.unknown_keys import refuse_unknown
from tinkerapi.config.vllm import vllm_from_table
from training.base_model_config import (
    BUILT_IN,
    DTYPES,
    LAYOUTS,
    MOST_RANKS,
    MOST_WORKERS,
    SAMPLERS,
    VLLM,
    BaseModelConfig,
    is_folder,
)

TABLE = "base_model"
MOST_BYTES = 2**60
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


def base_models_from_names(
    values: Sequence[str],
    *,
    device: str,
    dtype: str,
    layout: str = "auto",
    cache_bytes: int = 0,
    workers: int = 1,
    activation_bytes: int = 0,
) -> list[BaseModelConfig]:
    """Parse ``NAME``, ``FOLDER`` or ``NAME=PATH``; a folder's name is its last part.

    Args:
        device: The device of all of them.
        dtype: The dtype of all of them.
        layout: The layout of all of them.
        cache_bytes: That of all of them.
        workers: Of each of them.
        activation_bytes: That of all of them.

    Raises:
        ImproperlyConfigured: A side of ``=`` is empty.
    """
    found = []
    for value in values:
        is_path = is_folder(value)  # a folder's path may contain an equals sign
        name, has_path, path = (value, "", "") if is_path else value.partition("=")
        name, path = name.strip(), path.strip()
        if has_path and not (name and path):
            raise ImproperlyConfigured(
                f"TINKERAPI_BASE_MODEL: expected NAME, FOLDER or NAME=PATH, got {value!r}"
            )
        path = path or name
        found.append(
            BaseModelConfig(
                name=name if has_path else _public_name(path),
                path=path,
                device=device,
                dtype=dtype,
                layout=layout,
                cache_bytes=cache_bytes,
                workers=workers,
                activation_bytes=activation_bytes,
            )
        )
    return found


def base_models_from_file(path: Path) -> list[BaseModelConfig]:
    """The ``[[base_model]]`` tables of a TOML file, in order; the first is the default.

    Relative folders in it (``./models/qwen``) are relative to the file's folder.

    Raises:
        ImproperlyConfigured: It cannot be read, or a key or value in it is invalid. The message
            names file, table and key.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise ImproperlyConfigured(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ImproperlyConfigured(f"{path} is not TOML: {error}") from None
    refuse_unknown(content, (TABLE,), str(path))
    tables = content.get(TABLE)
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise ImproperlyConfigured(f"{path}: expected one or more [[{TABLE}]] tables")
    return [
        _from_table(table, f"{path}: {TABLE}[{index}]", path.parent)
        for index, table in enumerate(tables)
    ]


def _from_table(table: Mapping[str, Any], where: str, folder: Path) -> BaseModelConfig:
    refuse_unknown(table, [field.name for field in fields(BaseModelConfig)], where)
    for key in ("name", "path", "device", "dtype", "layout", "sampler"):
        if key in table and not (isinstance(table[key], str) and table[key].strip()):
            raise ImproperlyConfigured(f"{where}.{key}: expected a text, got {table[key]!r}")
    if not table.keys() & {"name", "path"}:
        raise ImproperlyConfigured(f"{where}: name is missing: the base model's name for clients")
    path = table.get("path", table.get("name", ""))
    if path.startswith("."):
        path = str((folder / path).resolve())
    values = {**table, "path": path, "name": table.get("name") or _public_name(path)}
    device = values.get("device", "auto")
    if not _DEVICE.fullmatch(device):
        raise ImproperlyConfigured(
            f"{where}.device: expected auto, cpu, cuda or cuda:N, got {device!r}"
        )
    values |= _ranks(table, where)
    num_ranks = values["tp_size"] * values["fsdp_size"]
    values |= _workers(table, where, num_ranks=num_ranks)
    _refuse_shared_devices(values["devices"] or (device,) * num_ranks, num_ranks, where)
    for key, choices in (("dtype", DTYPES), ("layout", LAYOUTS), ("sampler", SAMPLERS)):
        if values.get(key, choices[0]) not in choices:
            raise ImproperlyConfigured(
                f"{where}.{key}: expected one of {', '.join(choices)}, got {values[key]!r}"
            )
    for key in ("cache_bytes", "activation_bytes"):
        num_bytes = values.get(key, 0)
        if type(num_bytes) is not int or not 0 <= num_bytes <= MOST_BYTES:
            raise ImproperlyConfigured(
                f"{where}.{key}: expected a whole number of bytes, at most {MOST_BYTES},"
                f" got {num_bytes!r}"
            )
    values |= _sampler(table, where, folder)
    return BaseModelConfig(**values)


def _ranks(table: Mapping[str, Any], where: str) -> dict[str, int]:
    """The sizes of a worker over several devices."""
    sizes = {name: table.get(name, 1) for name in ("tp_size", "fsdp_size", "ep_size")}
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size <= MOST_RANKS:
            raise ImproperlyConfigured(
                f"{where}.{name}: expected 1 to {MOST_RANKS} devices, got {size!r}"
            )
    if sizes["tp_size"] > 1 and sizes["fsdp_size"] > 1:
        raise ImproperlyConfigured(
            f"{where}: tp_size {sizes['tp_size']} and fsdp_size {sizes['fsdp_size']} cannot be"
            " combined; leave one of them out"
        )
    if sizes["ep_size"] not in (1, sizes["tp_size"]):
        raise ImproperlyConfigured(
            f"{where}.ep_size: expected 1, or {sizes['tp_size']} like tp_size, got"
            f" {sizes['ep_size']}; experts are divided among the ranks that split the other layers"
        )
    return sizes


def _sampler(table: Mapping[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """The server's configuration, which is there exactly if the sampler is vLLM."""
    if table.get("sampler", BUILT_IN) != VLLM:
        if "vllm" in table:
            raise ImproperlyConfigured(
                f'{where}.vllm: expected only beside sampler = "{VLLM}"; add that line, or remove '
                "the table"
            )
        return {}
    if not isinstance(table.get("vllm"), dict):
        raise ImproperlyConfigured(
            f'{where}: sampler = "{VLLM}" needs a table [{TABLE}.vllm] with python or address'
        )
    if sizes := [name for name in ("tp_size", "fsdp_size") if table.get(name, 1) != 1]:
        raise ImproperlyConfigured(
            f'{where}: sampler = "{VLLM}" cannot be combined with {sizes[0]}; the worker of such a '
            "base model has one device, and the server may have more (--tensor-parallel-size)"
        )
    return {"vllm": vllm_from_table(table["vllm"], f"{where}.vllm", folder)}


def _workers(table: Mapping[str, Any], where: str, *, num_ranks: int) -> dict[str, Any]:
    """The number of workers and their devices: one of the two may follow from the other.

    Args:
        num_ranks: Of each worker.
    """
    devices = table.get("devices")
    if devices is None:
        workers = table.get("workers", 1)
    else:
        if not isinstance(devices, list) or not all(
            isinstance(device, str) and _DEVICE.fullmatch(device) for device in devices
        ):
            raise ImproperlyConfigured(
                f"{where}.devices: expected a list of auto, cpu, cuda or cuda:N, got {devices!r}"
            )
        if "device" in table:
            raise ImproperlyConfigured(
                f"{where}: device and devices are both given; devices has one for each worker, so "
                "leave device out"
            )
        workers = table.get("workers", len(devices) // num_ranks)
        expected = workers * num_ranks if type(workers) is int else None
        if len(devices) != expected:
            each = "" if num_ranks == 1 else f" times {num_ranks} ranks of each"
            raise ImproperlyConfigured(
                f"{where}.devices: expected one for each of the {workers!r} workers{each}, got "
                f"{len(devices)}"
            )
    if type(workers) is not int or not 1 <= workers <= MOST_WORKERS:
        raise ImproperlyConfigured(
            f"{where}.workers: expected 1 to {MOST_WORKERS} workers, got {workers!r}"
        )
    return {"workers": workers, "devices": tuple(devices or ())}


def _refuse_shared_devices(devices: Sequence[str], num_ranks: int, where: str) -> None:
    """Refuse ranks of one worker on one GPU, or on devices of two kinds."""
    for start in range(0, len(devices), num_ranks):
        own = devices[start : start + num_ranks]
        kinds = {"cpu" if device == "cpu" else "cuda" for device in own if device != "auto"}
        named = [device for device in own if device.startswith("cuda:")]
        if len(kinds) > 1 or len(named) > len(set(named)):
            raise ImproperlyConfigured(
                f"{where}: the {num_ranks} ranks of a worker need {num_ranks} different GPUs, or"
                f" cpu for all of them, got {', '.join(own)}; name them in devices"
            )


def _public_name(path: str) -> str:
    """The name of a base model that has only a path: the path's last part."""
    # Path.expanduser raises for an unknown user; here that is just a folder that does not exist.
    return Path(os.path.expanduser(path)).resolve().name if is_folder(path) else path
