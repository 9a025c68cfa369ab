"""The base models of this server: their names, folders and engine queues."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from django.conf import settings

from futures.selectors import worker_figure
from training.base_model_config import BUILT_IN, PACKED, BaseModelConfig, is_folder
from training.context_length import usable_context_tokens
from training.errors import BaseModelNotFound

DEFAULT_MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model that can be made without a model hub: a package on the index contains it."""


@dataclass(frozen=True, kw_only=True)
class ServedBaseModel:
    """One frozen model and the queue of the worker that holds it."""

    name: str
    """The name that clients use."""
    folder: Path
    """The folder of its config, tokenizer and weights."""
    queue: str
    config: BaseModelConfig
    """The operator's configuration."""

    @property
    def server_folder(self) -> Path:
        """For ``sampler="vllm"``: the folder of its server's connection and adapters."""
        return Path(settings.DATA_DIR) / "vllm" / self.queue

    @property
    def max_context_tokens(self) -> int | None:
        """The longest sequence that its worker accepts.

        Before a worker has served it, this is computed from its config.json, which may omit
        values that transformers fills in; None if it gives no limit or cannot be read.
        """
        enforced = worker_figure(self.queue, "max_context_tokens")
        return self.configured_context_tokens if enforced is None else int(enforced)

    @property
    def has_exact_logprobs(self) -> bool | None:
        """Whether a token that was sampled at temperature 1 has the same log-probability, to the
        bit, when it is scored or trained on; None before a worker has served it."""
        device, layout = (worker_figure(self.queue, name) for name in ("device", "layout"))
        if device is None or layout is None:
            return None
        is_alone = self.config.sampler == BUILT_IN and self.config.num_ranks == 1
        # Beyond the switch an answer is scored by factors that its first tokens did not have.
        is_switched = worker_figure(self.queue, "rotary_switch") is not None
        return bool(is_alone and device == "cpu" and layout == PACKED and not is_switched)

    @property
    def configured_context_tokens(self) -> int | None:
        """The longest sequence by its config.json; None if that gives no limit or cannot be
        read."""
        try:
            config = json.loads((self.folder / "config.json").read_text())
        except (OSError, ValueError):
            return None
        return usable_context_tokens(config) if isinstance(config, dict) else None


def base_model_of(config: BaseModelConfig, data_dir: Path) -> ServedBaseModel:
    """The base model of a configuration, with its folder and its worker's queue."""
    folder = (
        Path(os.path.expanduser(config.path)).resolve()  # Path.expanduser fails for an unknown user
        if is_folder(config.path)
        else data_dir / "models" / config.path.replace("/", "--")
    )
    slug = re.sub(r"[^a-z0-9]+", "-", config.name.lower()).strip("-")
    return ServedBaseModel(
        name=config.name, folder=folder, queue=f"engine-{slug}"[:100], config=config
    )


@cache
def _served(configs: tuple[BaseModelConfig, ...], data_dir: Path) -> dict[str, ServedBaseModel]:
    return {config.name: base_model_of(config, data_dir) for config in configs}


def base_models() -> list[ServedBaseModel]:
    """The served base models, the default first."""
    return list(_served(tuple(settings.BASE_MODELS), settings.DATA_DIR).values())


def queue_is_served(queue: str) -> bool:
    """Whether a worker of this server runs, or will run, the futures of an engine queue."""
    return any(base_model.queue == queue for base_model in base_models())


def base_models_problem() -> str | None:
    """Why the base models cannot be served together, as one sentence; None if they can."""
    queues = {base_model.queue for base_model in base_models()}
    if len(queues) == len(settings.BASE_MODELS):
        return None
    return (
        "each base model needs a different name, in which only letters and digits count, and a "
        f"folder's name is its last part; got {', '.join(c.name for c in settings.BASE_MODELS)}"
    )


def base_model_get(name: str | None) -> ServedBaseModel:
    """The base model of this name; None names the default.

    Raises:
        BaseModelNotFound: It is not served; the message lists the served ones. (404)
    """
    served = _served(tuple(settings.BASE_MODELS), settings.DATA_DIR)
    if name is None:
        return next(iter(served.values()))
    if name not in served:
        raise BaseModelNotFound(
            f"base_model: {name!r} is not served here; choose one of {', '.join(served)}"
        )
    return served[name]
