"""Which base models this server has: their names, folders and engine queues."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from django.conf import settings

from futures.selectors import worker_figure
from training.base_model_config import BaseModelConfig, is_folder
from training.context_length import usable_context_tokens
from training.errors import BaseModelNotFound

DEFAULT_MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The one that can be made without a model hub: a package on the index carries it."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """One frozen model and the queue of the worker that holds it."""

    name: str
    """What clients call it."""
    folder: Path
    """Where its config, tokenizer and weights are."""
    queue: str
    config: BaseModelConfig
    """As its operator wrote it."""

    @property
    def max_context_tokens(self) -> int | None:
        """The longest sequence that its worker takes.

        Before a worker has served it, what the worker will find in its config.json, which may leave
        out what transformers fills in; None if that says nothing or cannot be read.
        """
        enforced = worker_figure(self.queue, "max_context_tokens")
        return self._configured_context_tokens if enforced is None else int(enforced)

    @property
    def _configured_context_tokens(self) -> int | None:
        try:
            config = json.loads((self.folder / "config.json").read_text())
        except (OSError, ValueError):
            return None
        return usable_context_tokens(config) if isinstance(config, dict) else None


def base_model_of(config: BaseModelConfig, data_dir: Path) -> BaseModel:
    """Where the base model of a configuration is, and which queue is its worker's."""
    folder = (
        Path(os.path.expanduser(config.path)).resolve()  # Path's own fails for an unknown user
        if is_folder(config.path)
        else data_dir / "models" / config.path.replace("/", "--")
    )
    slug = re.sub(r"[^a-z0-9]+", "-", config.name.lower()).strip("-")
    return BaseModel(name=config.name, folder=folder, queue=f"engine-{slug}"[:100], config=config)


@cache
def _served(configs: tuple[BaseModelConfig, ...], data_dir: Path) -> dict[str, BaseModel]:
    return {config.name: base_model_of(config, data_dir) for config in configs}


def base_models() -> list[BaseModel]:
    """The served base models, the default first."""
    return list(_served(tuple(settings.BASE_MODELS), settings.DATA_DIR).values())


def queue_is_served(queue: str) -> bool:
    """Whether a worker of this server runs, or will run, what waits in an engine queue."""
    return any(base_model.queue == queue for base_model in base_models())


def base_models_problem() -> str | None:
    """What keeps them from being served beside each other, as one sentence; None: nothing."""
    queues = {base_model.queue for base_model in base_models()}
    if len(queues) == len(settings.BASE_MODELS):
        return None
    return (
        "each base model needs a name of its own, in which only letters and digits count, and a "
        f"folder's name is its last part; got {', '.join(c.name for c in settings.BASE_MODELS)}"
    )


def base_model_get(name: str | None) -> BaseModel:
    """The base model of this name; None names the default.

    Raises:
        BaseModelNotFound: Not served here; the message lists what is. (404)
    """
    served = _served(tuple(settings.BASE_MODELS), settings.DATA_DIR)
    if name is None:
        return next(iter(served.values()))
    if name not in served:
        raise BaseModelNotFound(
            f"base_model: {name!r} is not served here; choose one of {', '.join(served)}"
        )
    return served[name]
