"""The files of an adapter in peft's format, and what their headers say.

Only the header of ``adapter_model.safetensors`` is read here: names, types and shapes. It is JSON
behind a length, so reading it runs no code and takes memory for the header alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import InvalidRequest
from training.peft_import.config import (
    CONFIG_NAME,
    EXPERT_LAYERS,
    PeftConfig,
    parse_peft_config,
)
from training.types import LoraConfig

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

MAX_CONFIG_BYTES = 1024 * 1024
MAX_HEADER_BYTES = 8 * 1024 * 1024
"""A header takes about 150 bytes for each matrix: this is enough for 25,000 layers."""

DTYPES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
"""Types of numbers that are read, and the bytes of one."""

WRAPPER = ".base_layer"

_MATRIX = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_BASE_COPY = re.compile(r"base_model\.model\.(?P<module>[^:]+?)(\.base_layer)?\.weight")


@dataclass(frozen=True, kw_only=True)
class PeftFiles:
    """An adapter in peft's format, as far as it can be known without its base model."""

    directory: Path
    config: PeftConfig
    ranks: Mapping[str, int]
    """Module -> rank of its two matrices, in the order of their names."""
    experts: Mapping[str, int]
    """Module of experts, with ``.base_layer`` for each of peft's wrappers around its own -> the
    ranks of all experts, added up."""
    base_copies: Mapping[str, str]
    """Tensor -> module whose own weights it repeats, as peft does beside an adapter of the head."""

    @property
    def lora_config(self) -> LoraConfig:
        """The shape that holds it: the largest rank, with the update's factor kept for it."""
        config = self.config
        rank = max([*self.ranks.values(), *([config.rank] if self.experts else [])])
        alpha = config.alpha
        if config.is_rslora or rank != config.rank:
            alpha = config.scale(config.rank, config.alpha) * rank
        return LoraConfig(
            rank=rank,
            alpha=alpha,
            target_modules=self._target_modules,
            share_across_experts=not self.experts,
        )

    @property
    def expert_layers(self) -> tuple[str, ...]:
        """The linear layers of experts that it adapts, by our names."""
        return tuple(
            f"{module}.{layer}"
            for module in dict.fromkeys(map(_without_wrappers, self.experts))
            for leaf, layers in EXPERT_LAYERS.items()
            if names_parameter(self.config.target_parameters, f"{module}.{leaf}")
            for layer in layers
        )

    @property
    def _target_modules(self) -> tuple[str, ...]:
        """Names that select its modules: its own short ones where they suffice."""
        config = self.config
        is_short = isinstance(config.target_modules, tuple) and not config.target_parameters
        if is_short and config.layers is None and not config.exclude_modules:
            return tuple(config.target_modules)
        return (*self.ranks, *self.expert_layers)

    def sha256(self) -> str:
        """Of both files: it stands for the adapter."""
        digest = hashlib.sha256()
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            with (self.directory / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def read_peft_files(directory: Path) -> PeftFiles:
    """The adapter in a folder.

    Raises:
        InvalidRequest: A file is missing or broken, or the adapter is of another kind than those
            that are computed here; the message names file and field. (400)
    """
    config_file = directory / CONFIG_NAME
    if not config_file.is_file():
        raise InvalidRequest(f"{CONFIG_NAME}: is missing; peft's save_pretrained writes it")
    if config_file.stat().st_size > MAX_CONFIG_BYTES:
        raise InvalidRequest(f"{CONFIG_NAME}: is larger than {MAX_CONFIG_BYTES} bytes")
    config = parse_peft_config(config_file.read_bytes())
    matrices: dict[str, dict[str, list[int]]] = {}
    base_copies: dict[str, str] = {}
    for name, (_, shape) in sorted(read_header(directory).items()):
        if match := _MATRIX.fullmatch(name):
            matrices.setdefault(match["module"], {})[match["side"]] = shape
        elif ".lora_" not in name and (match := _BASE_COPY.fullmatch(name)):
            base_copies[name] = match["module"]
        else:
            raise _refusal(
                f"tensor {name!r:.200} is none that is computed here; expected "
                "base_model.model.<module>.lora_A.weight and lora_B.weight of linear layers"
            )
    if not matrices:
        raise _refusal("has no LoRA matrix")
    ranks = {module: _rank(module, pair) for module, pair in matrices.items()}
    experts = {m: rank for m, rank in ranks.items() if _is_of_experts(config, m)}
    return PeftFiles(
        directory=directory,
        config=config,
        ranks={module: rank for module, rank in ranks.items() if module not in experts},
        experts=experts,
        base_copies=base_copies,
    )


def names_parameter(targets: Iterable[str], name: str) -> bool:
    """Whether one of ``target_parameters`` is a parameter's name or the end of it, as in peft."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _without_wrappers(module: str) -> str:
    while module.endswith(WRAPPER):
        module = module.removesuffix(WRAPPER)
    return module


def _is_of_experts(config: PeftConfig, module: str) -> bool:
    own = _without_wrappers(module)
    return any(names_parameter(config.target_parameters, f"{own}.{leaf}") for leaf in EXPERT_LAYERS)


def _rank(module: str, pair: Mapping[str, list[int]]) -> int:
    for side in "AB":
        if side not in pair:
            raise _refusal(f"{module[:200]}.lora_{side}.weight is missing")
        if len(pair[side]) != 2:
            raise _refusal(
                f"{module[:200]}.lora_{side}.weight has shape {pair[side][:9]}; expected a matrix "
                "of a linear layer"
            )
    a, b = pair["A"], pair["B"]
    if a[0] != b[1] or a[0] < 1:
        raise _refusal(
            f"{module[:200]}: lora_A has shape {a} and lora_B {b}; expected [rank, in] and "
            "[out, rank]"
        )
    return a[0]


def read_header(directory: Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor -> type and shape, of a complete file without gaps.

    Raises:
        InvalidRequest: (400)
    """
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        has_pickle = (directory / PICKLE_NAME).is_file()
        raise _refusal(
            f"is missing; {PICKLE_NAME} is a pickle, which may hold code and is not read: load it "
            "where you trust it and save it with save_pretrained"
            if has_pickle
            else "is missing; peft's save_pretrained writes it"
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(8)
        length = int.from_bytes(begin, "little")
        if begin[:4] == b"PK\x03\x04" or begin[:1] == b"\x80":
            raise _refusal("is a pickle, which may hold code and is not read")
        if len(begin) < 8 or length > size - 8:
            raise _refusal("is not a safetensors file, or was cut off")
        if length > MAX_HEADER_BYTES:
            raise _refusal(f"has a header of more than {MAX_HEADER_BYTES} bytes")
        try:
            header: Any = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise _refusal("is not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise _refusal("is not a safetensors file: its header is no object")
    header.pop("__metadata__", None)
    _check_complete(header, size - 8 - length)
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}


def _check_complete(header: Mapping[str, Any], data_bytes: int) -> None:
    """The tensors lie behind each other, and fill the file."""
    spans = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (KeyError, TypeError, ValueError):
            raise _refusal(f"the header's entry of {name!r:.200} is broken") from None
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise _refusal(f"the header's entry of {name!r:.200} is broken")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise _refusal(
                f"tensor {name!r:.200} has type {dtype!r:.20}; expected one of {', '.join(DTYPES)}"
            )
        count = DTYPES[dtype]
        for number in shape[:9]:
            count *= number
        if len(shape) > 8 or count != end - begin:
            raise _refusal(f"tensor {name!r:.200} has another size than its shape")
        spans.append((begin, end))
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise _refusal("is not a safetensors file: its tensors overlap or leave gaps")
        at = end
    if at != data_bytes:
        raise _refusal("was cut off, or has bytes behind its tensors")


def _refusal(why: str) -> InvalidRequest:
    return InvalidRequest(f"{WEIGHTS_NAME}: {why}")
