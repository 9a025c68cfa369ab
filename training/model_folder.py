"""Why a folder cannot be a base model's: the first thing that is wrong, as one true sentence.

``up`` says it before it starts anything, and the worker before it loads the model. Nothing is read
but names, the configuration and the headers of the weights. Code in the folder is not looked at,
since it is never run.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_LFS = b"version https://git-lfs"

_OTHER_WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "a pickle, which may hold code and is not read; load it where you trust it and save it with "
    "save_pretrained, which writes safetensors": ("*.bin", "*.pth", "*.pt", "*.ckpt"),
    "a GGUF file, whose numbers are quantized; give this server the model's original folder with "
    "safetensors": ("*.gguf",),
    "a format of TensorFlow, Flax, ONNX or MLX; save the model with PyTorch's save_pretrained, "
    "which writes safetensors": ("*.h5", "*.msgpack", "*.onnx", "*.npz"),
}
"""Why weights in other files are not read, and the files' endings."""

_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt")
"""Files that a training leaves beside the weights."""

_DEQUANTIZERS = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""Methods that transformers can undo, and its configuration for that."""


def model_folder_problem(folder: Path) -> str | None:
    """The reason why this folder cannot be loaded, as one sentence; None if none is found.

    Raises:
        OSError: A file cannot be read.
    """
    if not folder.is_dir():
        if folder.suffix == ".gguf" and folder.is_file():
            return f"{folder} is {_why_not('*.gguf')}"
        return f"there is no folder {folder}"
    if (folder / ADAPTER).is_file():
        return _adapter_sentence(folder)
    config_file = folder / "config.json"
    if not config_file.is_file():
        has_gguf = next(folder.glob("*.gguf"), None)
        if has_gguf is not None:
            return f"{folder} has its weights in {has_gguf.name}, {_why_not('*.gguf')}"
        return f"{folder} is not a model folder: it has no config.json"
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        return f"{config_file} is not JSON: {error}"
    if not isinstance(config, dict):
        return f"{config_file} is not a JSON object"
    return _quantized_sentence(folder, config) or _weights_problem(folder)


def quantized_problem(folder: Path) -> str | None:
    """The sentence that refuses quantized weights, which the configuration alone tells."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return _quantized_sentence(folder, config) if isinstance(config, dict) else None


def _why_not(ending: str) -> str:
    return next(why for why, endings in _OTHER_WEIGHTS.items() if ending in endings)


def _adapter_sentence(folder: Path) -> str:
    try:
        base = json.loads((folder / ADAPTER).read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = None
    serve = f"serve {base!r:.200}" if base else "serve its base model"
    if (folder / "config.json").is_file():
        return (
            f"{folder} holds an adapter beside the model ({ADAPTER}), which would be loaded into "
            "it unseen; move the adapter elsewhere, and import it with `importpeft`"
        )
    return f"{folder} is an adapter and no model; {serve}, and import the adapter with `importpeft`"


def _quantized_sentence(folder: Path, config: Mapping[str, Any]) -> str | None:
    method = _quantization(folder, config)
    if method is None:
        return None
    undo = _DEQUANTIZERS.get(method)
    how = (
        f"; load it with transformers.{undo}(dequantize=True) and save it with save_pretrained, or"
        if undo
        else ";"
    )
    return (
        f"{folder} holds weights quantized by {method}, which this server does not train on{how} "
        "give it the model's float32, bfloat16 or float16 weights"
    )


def _quantization(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The method by which the weights are quantized; None if they are not."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        if quantized := part.get("quantization_config") or part.get("compression_config"):
            method = quantized.get("quant_method") if isinstance(quantized, dict) else None
            return str(method or "an unknown method")
    quantized = config.get("quantization")  # as MLX writes it
    if isinstance(quantized, dict) and "bits" in quantized:
        return "mlx"
    # Files of the first versions of GPTQ and AWQ, and of TensorRT's tools.
    for name, method in (
        ("quantize_config.json", "gptq"),
        ("quant_config.json", "awq"),
        ("hf_quant_config.json", "modelopt"),
    ):
        if (folder / name).is_file():
            return method
    return None


def _weights_problem(folder: Path) -> str | None:
    if problem := weights_absent(str(folder), [path.name for path in folder.iterdir()]):
        return problem
    if not (folder / WHOLE).is_file():
        try:
            shards = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
            missing = [name for name in shards if not (folder / name).is_file()]
        except (ValueError, TypeError, LookupError, AttributeError):
            return f"{folder / INDEX} is not an index of weights"
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            return (
                f"{folder} lacks {missing[0]}{more}, which its index names; download it again, "
                "which continues where it stopped"
            )
    for path in sorted(folder.glob("*.safetensors")):
        if problem := _file_problem(path):
            return problem
    return None


def weights_absent(where: str, names: Collection[str]) -> str | None:
    """Why a folder, or a repository, of these files has no weights that are read; None if it has.

    Args:
        where: Its name in the sentence.
    """
    if not {WHOLE, INDEX}.isdisjoint(names):
        return None
    named = sorted(fnmatch.filter(names, "*.safetensors"))
    if any(_SHARD.fullmatch(name) for name in named):
        return f"{where} has {named[0]}, but not {INDEX}, which says what is in it"
    if named:
        return f"{where} has {named[0]}, but not {WHOLE}, under which name weights are read"
    for why, endings in _OTHER_WEIGHTS.items():
        others = sorted(name for ending in endings for name in fnmatch.filter(names, ending))
        if others := [name for name in others if name not in _NO_WEIGHTS]:
            return f"{where} has its weights in {others[0]}, {why}"
    return f"{where} has no weights (*.safetensors)"


def _file_problem(path: Path) -> str | None:
    """The problem of a safetensors file that its header shows; the tensors are not read.

    The file is the header's length (8 bytes), the header (JSON) and the bytes of all tensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(len(_LFS))
        if begin == _LFS:
            return f"{path} is a pointer of Git LFS; fetch the file itself with `git lfs pull`"
        file.seek(8)
        header_size = int.from_bytes(begin[:8], "little")
        try:
            header = json.loads(file.read(header_size if header_size <= size else 0))
            header.pop("__metadata__", None)
            ends = [tensor["data_offsets"][1] for tensor in header.values()]
            whole = 8 + header_size + max(ends, default=0)
        except (ValueError, TypeError, AttributeError, LookupError):
            return f"{path} is not a safetensors file, or only its beginning"
    if size < whole:
        return f"{path} is cut off: it has {size:,} of {whole:,} bytes"
    return None
