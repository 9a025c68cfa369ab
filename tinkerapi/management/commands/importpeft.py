"""``manage.py importpeft FOLDER``: makes a checkpoint of an adapter that peft has trained."""

from __future__ import annotations

import shutil
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any, cast

from django.contrib.auth.models import User
from django.core.management import CommandError
from django.core.management.base import BaseCommand

from futures.errors import FutureError
from futures.models import Future
from futures.transitions import State
from training.errors import TrainingError
from training.kinds import SaveWeightsResult, stored_result
from training.peft_import.config import CONFIG_NAME
from training.peft_import.files import PICKLE_NAME, WEIGHTS_NAME
from training.services.imports import IMPORTED, adapter_import_submit

POLL_SECONDS = 0.2


class Command(BaseCommand):
    help = (
        "Make a checkpoint of a LoRA adapter in peft's format, and print its path. The server must "
        "be running. The folder is copied, and nothing in it is run."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("folder", help=f"a folder with {CONFIG_NAME} and {WEIGHTS_NAME}")
        parser.add_argument("--owner", required=True, help="the user who gets the checkpoint")
        parser.add_argument("--base-model", help="a served base model; default: the first")
        parser.add_argument("--model-id", help="first part of its path; default: a new name")
        parser.add_argument("--name", default=IMPORTED, help="its name; default: %(default)s")
        parser.add_argument("--overwrite", action="store_true", help="replace one of this name")
        parser.add_argument(
            "--timeout",
            type=float,
            default=600.0,
            help="seconds to wait for the worker (default %(default)s)",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        folder = Path(options["folder"])
        if not folder.is_dir():
            raise CommandError(f"there is no folder {folder}")
        owner = User.objects.filter(username=options["owner"]).first()
        if owner is None:
            raise CommandError(f"--owner: there is no user {options['owner']!r}")
        try:
            submission = adapter_import_submit(
                owner_id=owner.pk,
                write_files=lambda directory: _copy(folder, directory),
                base_model=options["base_model"],
                model_id=options["model_id"],
                name=options["name"],
                overwrite=options["overwrite"],
            )
        except (TrainingError, FutureError, OSError) as error:
            raise CommandError(f"{folder}: {error}") from error
        future = self._wait(submission.future, options["timeout"])
        if future.state != State.READY:
            raise CommandError(f"{folder}: {future.error}")
        saved = cast(SaveWeightsResult, stored_result(future.kind, bytes(future.result or b"")))
        self.stdout.write(str(saved.path))

    def _wait(self, future: Future, timeout: float) -> Future:
        deadline = time.monotonic() + timeout
        while not future.is_final:
            if time.monotonic() > deadline:
                raise CommandError(f"{future.id} is still {future.state}; is a worker running?")
            time.sleep(POLL_SECONDS)
            future.refresh_from_db(fields=["state", "error", "result"])
        return future


def _copy(folder: Path, directory: Path) -> None:
    for name in (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, directory / name)
