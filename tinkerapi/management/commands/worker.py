"""``tinkerapi worker --join``: workers on this machine for a server that runs on another one.

They need the server's database (DATABASE_URL), its bucket (TINKERAPI_STORAGE) or its data folder,
mounted here (TINKERAPI_DATA_DIR), and the same base models in their settings. Everything is checked
before a worker starts; a worker that differs would compute other bits.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from types import FrameType
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import OperationalError, connection

from tinkerapi.server.joining import clock_problem, environment_problems, storage_problem
from tinkerapi.server.preflight import base_model_problem
from tinkerapi.server.supervisor import Refused, Supervisor
from tinkerapi.server.upgrade import SchemaError, database_down_reason, unapplied_migrations
from tinkerapi.server.vllm_part import VllmPart, vllm_problem
from tinkerapi.server.worker_part import part_environment, worker_part
from training.base_models import ServedBaseModel, base_model_get, base_models
from training.errors import BaseModelNotFound

TICK_SECONDS = 0.1


class Command(BaseCommand):
    help = (
        "Start workers on this machine for a server that runs on another one, and keep them "
        "running. They need only its database (DATABASE_URL) and its bucket (TINKERAPI_STORAGE) or "
        "its data folder (TINKERAPI_DATA_DIR)."
    )
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--join",
            action="store_true",
            required=True,
            help="join the server of DATABASE_URL; a server's own workers are started by `up`",
        )
        parser.add_argument(
            "--base-model", help="one of the base models; default: all of the settings"
        )
        parser.add_argument(
            "--check", action="store_true", help="only check whether workers could join"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        self._stops_requested = 0
        try:
            name = options["base_model"]
            chosen = base_models() if name is None else [base_model_get(name)]
        except BaseModelNotFound as error:
            raise CommandError(str(error)) from error
        if problems := _problems(chosen):
            raise CommandError(
                "this machine cannot join:\n" + "\n".join(f"- {line}" for line in problems),
                returncode=os.EX_CONFIG,
            )
        if options["check"]:
            self.stdout.write("this machine can join")
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        self._supervise(chosen)

    def _supervise(self, chosen: list[ServedBaseModel]) -> None:
        supervisor = Supervisor(self._say)
        host = socket.gethostname()
        environment = part_environment(settings.SECRET_KEY)
        try:
            for base_model in chosen:
                if base_model.config.vllm is not None and base_model.config.vllm.python:
                    log_name = f"{base_model.queue}.{host}.vllm"
                    vllm = VllmPart(base_model, environment, log_name=log_name)
                    supervisor.add(vllm)
                    self._say(f"{vllm.name} starts; its log is {vllm.log}")
                for number in range(1, base_model.config.workers + 1):
                    log_name = f"{base_model.queue}.{host}.{number}"
                    part = worker_part(base_model, number, environment, log_name=log_name)
                    supervisor.add(part)
                    self._say(f"{part.name} starts; its log is {part.log}")
            while not self._stops_requested:
                supervisor.tick()
                time.sleep(TICK_SECONDS)
        except Refused as error:
            raise CommandError(str(error).replace("CommandError: ", "", 1)) from error
        finally:
            connection.close()
            supervisor.stop(lambda: self._stops_requested > 1)
        self._say("stopped")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stops_requested += 1

    def _say(self, line: str) -> None:
        self.stdout.write(line)
        self.stdout.flush()


def _problems(chosen: list[ServedBaseModel]) -> list[str]:
    """Why workers of this machine cannot join, in the order of dependencies."""
    if not settings.DATABASE_URL:
        return [
            "database: DATABASE_URL is not set; expected the address of the server's Postgres. Its "
            "embedded Postgres cannot be reached from other machines"
        ]
    try:
        connection.ensure_connection()
    except OperationalError as error:
        return [f"database: {database_down_reason(error) or str(error).splitlines()[0]}"]
    try:
        if count := unapplied_migrations():
            return [
                f"tables: {count} migrations of this version are missing; upgrade the server first"
            ]
    except SchemaError as error:
        return [f"tables: {error}"]
    if problem := storage_problem():
        return [problem]
    problems = []
    if problem := clock_problem():
        problems.append(problem)
    for base_model in chosen:
        if problem := base_model_problem(base_model.folder):
            problems.append(f"base model {base_model.name}: {problem}")
        else:
            problems += environment_problems(base_model)
        if problem := vllm_problem(base_model):
            problems.append(problem)
    return problems
