"""The process that holds one base model and does the work of its queue."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from futures.errors import QueueTaken
from training.base_models import base_model_get
from training.errors import TrainingError
from training.worker.process import build_engine, run_worker


class Command(BaseCommand):
    help = "Hold one base model and run its futures; `up` starts one worker per base model."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--base-model", help="one of TINKERAPI_BASE_MODEL; default: the first")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            run_worker(base_model_get(options["base_model"]), build_engine)
        except (TrainingError, QueueTaken) as error:
            raise CommandError(str(error)) from error
