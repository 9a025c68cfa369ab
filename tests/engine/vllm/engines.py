"""Engines of ours that sample from a server."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from training.base_model_config import VllmConfig
from training.engine.factory import ServerPlace, engine_over
from training.engine.interface import Engine
from training.engine.torch.base_model import BaseModel
from training.vllm_server import VllmConnection, write_connection


class Server(Protocol):
    """A server of a test."""

    @property
    def connection(self) -> VllmConnection | None:
        """Where it listens now."""


def engine_with_server(
    base_model: BaseModel, server: Server, folder: Path, **config: object
) -> Engine:
    """An engine whose samples come from a server where possible.

    Args:
        folder: For its connection and the files of versions.
    """
    announce(server, folder)
    defaults: dict[str, object] = {"python": "python", "max_lora_rank": 8, "max_loras": 2}
    place = ServerPlace(VllmConfig(**{**defaults, **config}), folder)  # type: ignore[arg-type]
    return engine_over(base_model, vllm=place)


def announce(server: Server, folder: Path) -> None:
    """Tell engines where the server listens, as ``up`` does."""
    if server.connection is not None:
        write_connection(folder, server.connection)
