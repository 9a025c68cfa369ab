"""The process that holds one base model and runs the futures of its queue."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from futures.errors import QueueTaken
from training.base_models import base_model_get
from training.errors import (
    BaseModelNotFound,
    DeviceNotFound,
    TrainingError,
    WorkerDisagrees,
)
from training.worker.process import build_engine, run_worker


class Command(BaseCommand):
    help = "Hold one base model and run its futures; `up` starts the workers of each base model."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--base-model", help="one of TINKERAPI_BASE_MODEL; default: the first")
        parser.add_argument(
            "--number",
            type=int,
            default=1,
            help="of this worker among the base model's on this machine: it decides the device "
            "(default: %(default)s)",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            base_model = base_model_get(options["base_model"])
            number, workers = options["number"], base_model.config.workers
            if not 1 <= number <= workers:
                raise CommandError(
                    f"--number: expected 1 to {workers}, the workers of {base_model.name}, got "
                    f"{number}",
                    returncode=os.EX_CONFIG,
                )
            run_worker(base_model, partial(build_engine, number=number - 1))
        except (BaseModelNotFound, DeviceNotFound, WorkerDisagrees) as error:
            # Another start would end in the same way; the exit code tells the supervisor.
            sentence = " ".join(str(error).split())
            raise CommandError(sentence, returncode=os.EX_CONFIG) from error
        except (TrainingError, QueueTaken) as error:
            raise CommandError(str(error)) from error
