"""The process that holds one base model and runs the futures of its queue."""

from __future__ import annotations

import os
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from futures.errors import QueueTaken
from training.base_models import base_model_get
from training.errors import BaseModelNotFound, DeviceNotFound, TrainingError
from training.worker.process import build_engine, run_worker


class Command(BaseCommand):
    help = "Hold one base model and run its futures; `up` starts one worker per base model."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--base-model", help="one of TINKERAPI_BASE_MODEL; default: the first")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            run_worker(base_model_get(options["base_model"]), build_engine)
        except (BaseModelNotFound, DeviceNotFound) as error:
            # Another start would end in the same way; the exit code tells the supervisor.
            sentence = " ".join(str(error).split())
            raise CommandError(sentence, returncode=os.EX_CONFIG) from error
        except (TrainingError, QueueTaken) as error:
            raise CommandError(str(error)) from error
