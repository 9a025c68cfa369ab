"""Base models as the settings hold them, by name or folder alone."""

from __future__ import annotations

from tinkerapi.config.base_models import base_models_from_names
from training.base_model_config import BaseModelConfig


def base_model_configs(*names: str, device: str = "auto") -> list[BaseModelConfig]:
    """The configurations that TINKERAPI_BASE_MODEL gives for these names."""
    return base_models_from_names(names, device=device, dtype="auto")
