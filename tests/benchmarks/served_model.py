"""The base model of a benchmark: its folder, a server on it, and its engine without a server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import django

from tests.base_models import base_model_configs
from tests.server import Server, free_port
from tests.tiny_model import make_tiny_model
from training.engine.interface import Engine

LOG_CHARACTERS = 4000  # of each log, when a benchmark fails
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_FOLDER = Path("models") / DEFAULT_MODEL.replace("/", "--")


@contextmanager
def served(
    model: str, data_dir: Path, folder: Path | None = None, **settings: str
) -> Iterator[tuple[Server, Path]]:
    """A ready server on a fresh data folder, and the folder of its base model.

    Args:
        model: ``tiny`` (a few thousand parameters) or ``default`` (SmolLM2-135M-Instruct).
        data_dir: An empty folder.
        folder: Where the default model was prepared before; None prepares it again.
        settings: The server's environment variables.
    """
    if model == "tiny":
        folder = make_tiny_model(data_dir / "tiny")
    environment = settings if folder is None else {**settings, "TINKERAPI_BASE_MODEL": str(folder)}
    server = Server(data_dir, free_port(), environment)
    try:
        server.start()
        yield server, folder or data_dir / DEFAULT_FOLDER
    except Exception:
        for log in sorted((data_dir / "logs").glob("*.log")):  # the folder is temporary
            print(f"--- {log.name}", log.read_text(errors="replace")[-LOG_CHARACTERS:], sep="\n")
        raise
    finally:
        server.stop()


def base_model_name(server: Server) -> str:
    """The name of its base model for clients."""
    folder = server.environment.get("TINKERAPI_BASE_MODEL")
    return Path(folder).name if folder else DEFAULT_MODEL


def use_database_of(server: Server) -> None:
    """Set up Django in this process as a command of that server's would be."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "tinkerapi.settings"
    os.environ["TINKERAPI_DATA_DIR"] = str(server.data_dir)
    os.environ |= server.environment
    django.setup()


def bare_engine(folder: Path) -> Engine:
    """The engine that a worker would build for this folder, in this process."""
    from django.conf import settings

    from training.base_models import base_model_get
    from training.worker.process import build_engine

    settings.BASE_MODELS = base_model_configs(str(folder))
    return build_engine(base_model_get(None))
