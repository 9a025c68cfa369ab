"""``manage.py up``: runs the whole server until Ctrl+C.

The order makes a second start fast: Postgres and the tables first (a tenth of a
second when they exist), then web, which needs no model, then the workers of each base model. Only
the first start has a long task, making the model's folder, which runs in parallel. This
process loads no torch and does nothing for requests; it starts, watches, restarts and stops.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from http import HTTPStatus
from types import FrameType
from typing import Any

from django.conf import settings
from django.core.management import CommandError, call_command
from django.core.management.base import BaseCommand
from django.db import OperationalError, connection

from futures.lost_workers import workers_reap
from tinkerapi.server.disk_history import disk_note
from tinkerapi.server.joining import moved_storage_problem, storage_claim_problem
from tinkerapi.server.postgres import EmbeddedPostgres
from tinkerapi.server.postgres_cluster import PostgresError
from tinkerapi.server.preflight import (
    PreflightError,
    RunningServer,
    base_model_problem,
    check_port,
    is_loopback,
    keep_secret_key,
    lock_data_folder,
    resolve_host,
)
from tinkerapi.server.private_folder import folder_close
from tinkerapi.server.repeated_command import RepeatedCommand
from tinkerapi.server.supervisor import (
    FIRST_DELAY_SECONDS,
    MAX_DELAY_SECONDS,
    Child,
    Refused,
    Supervisor,
)
from tinkerapi.server.upgrade import SchemaError, schema_migrate
from tinkerapi.server.vllm_part import VllmPart, vllm_problem
from tinkerapi.server.worker_part import log_path, part_environment, worker_part
from tinkerapi.services import ADMIN_USERNAME, LOCAL_USERNAME, first_accounts_ensure
from training.base_models import ServedBaseModel, base_models, base_models_problem
from training.errors import StorageFailed
from training.parent_death import parent_death_prefix
from training.storage.chosen import storage
from training.worker.crash_log import crashed

TICK_SECONDS = 0.1
READY_LOOK_SECONDS = 0.5  # each check while the worker loads costs a query and a log line
NOTE_DISK_SECONDS = 60.0  # each look reads the notes; one is taken every hour
LOST_PART_SECONDS = 2.0  # readiness shows the end of a part within this time
WEB_STOP_SECONDS = 5.0
WEBHOOK_STOP_SECONDS = 1.0
WEB_KILL_SECONDS = 3  # longest delay of web's end by a long poll; its client polls again
OPEN_REQUESTS = 8192  # parked long polls count, so granian's 1024 would be a limit on users


class StopRequested(BaseException):
    """A signal asked us to stop; raised in the main thread, anywhere."""


class Command(BaseCommand):
    help = "Start the whole server: Postgres, web and the workers of each base model."
    requires_system_checks = ()  # web runs them; here they would import every view

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
        parser.add_argument("--port", type=int, default=8000, help="port to listen on")
        parser.add_argument(
            "--max-restart-delay",
            type=float,
            default=MAX_DELAY_SECONDS,
            metavar="SECONDS",
            help="longest wait before a part that keeps ending is started again; "
            "default: %(default)s",
        )

    def handle(
        self, *args: Any, host: str, port: int, max_restart_delay: float, **options: Any
    ) -> None:
        _require("--port", port, 1, 65535)
        _require("--max-restart-delay", max_restart_delay, FIRST_DELAY_SECONDS, 86400)
        self.started_at = time.monotonic()
        self.stops_requested = 0
        self.supervisor = Supervisor(self.say, max_delay_seconds=max_restart_delay)
        self.preparations: dict[str, subprocess.Popen[bytes]] = {}
        self.pruning: RepeatedCommand | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup still works
                signal.signal(number, self._on_signal)
        try:
            self.server = RunningServer(pid=os.getpid(), host=resolve_host(host), port=port)
            with self._preflight() as environment:
                self._run(environment)
        except StopRequested:
            self.say("stopped")
        except (PreflightError, PostgresError, SchemaError, StorageFailed) as error:
            raise CommandError(str(error)) from error
        except Refused as error:
            # The part was a command too, and Django has put the same word before its message.
            raise CommandError(str(error).replace("CommandError: ", "", 1)) from error
        except OSError as error:  # for example a full disk
            raise CommandError(f"the server cannot continue: {error}") from error

    def say(self, line: str) -> None:
        self.stdout.write(line)
        self.stdout.flush()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stops_requested += 1
        if self.stops_requested == 1:
            raise StopRequested

    @contextlib.contextmanager
    def _preflight(self) -> Iterator[dict[str, str]]:
        """Hold the data folder; yield the environment that all children share."""
        host = self.server.host
        with lock_data_folder(settings.DATA_DIR, self.server) as killed:
            # The web process of an ``up`` that was killed needs a moment to leave its port.
            check_port(host, self.server.port, wait_seconds=10 if killed else 0)
            if remark := folder_close(settings.DATA_DIR):
                self.say(f"data      {remark}")
            if problem := base_models_problem():
                raise PreflightError(problem)
            for base_model in base_models():
                problem = base_model_problem(base_model.folder)
                if problem and not _can_be_prepared(base_model):
                    raise PreflightError(f"base model {base_model.name}: {problem}")
                if problem := vllm_problem(base_model):
                    raise PreflightError(problem)
            require_api_key = settings.REQUIRE_API_KEY
            if not is_loopback(host) and not require_api_key:
                require_api_key = True
                self.say(f"{host} can be reached from elsewhere: every request needs a key")
            elif require_api_key:
                self.say("keys      every request needs one")
            else:
                self.say(
                    "keys      none needed: every program on this machine acts as the user "
                    f"{LOCAL_USERNAME}; behind a proxy, set TINKERAPI_PUBLIC_URL"
                )
            if problem := storage().problem():
                raise PreflightError(f"TINKERAPI_STORAGE: {problem}")
            secret_key = os.environ.get("TINKERAPI_SECRET_KEY") or keep_secret_key(
                settings.DATA_DIR
            )
            yield {
                **part_environment(secret_key),
                "TINKERAPI_REQUIRE_API_KEY": "1" if require_api_key else "0",
            }

    def _run(self, environment: dict[str, str]) -> None:
        try:
            self._prepare_models(environment)
            self._start_database()
            self._start_web(environment)
            self._start_webhook(environment)
            call_command("collectstatic", interactive=False, verbosity=0)
            self._supervise(environment)
        finally:
            # From here on a signal only speeds up the stop.
            self.stops_requested = max(self.stops_requested, 1)
            for process in self.preparations.values():
                process.kill()
                process.wait()
            if self.pruning is not None:
                self.pruning.stop()
            connection.close()
            self.supervisor.stop(lambda: self.stops_requested > 1)

    def _prepare_models(self, environment: dict[str, str]) -> None:
        """Start making the folders that are missing, each in its own process."""
        self.say(f"data      {settings.DATA_DIR}")
        if storage().is_remote:
            self.say(f"storage   {storage().location}")
        for base_model in base_models():
            if not base_model.folder.exists():
                self.say(f"model     {base_model.name}: making its folder, once")
                command = [sys.executable, "-m", "tinkerapi", "preparemodel"]
                self.preparations[base_model.name] = subprocess.Popen(  # noqa: S603
                    [*parent_death_prefix("KILL"), *command, base_model.name],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    process_group=0,
                )

    def _start_database(self) -> None:
        if settings.DATABASE_URL:
            where = "your server (DATABASE_URL)"
        else:
            postgres = EmbeddedPostgres(settings.DATA_DIR, say=self.say)
            if not postgres.cluster.exists():
                self.say("postgres  making a new cluster")
            self.supervisor.add(postgres)
            where = str(postgres.cluster)
        self.say(f"postgres  {where}")
        try:
            count = schema_migrate()
        except OperationalError as error:
            raise PreflightError(f"the database does not answer: {_first_line(error)}") from error
        self.say(f"database  {f'{count} migrations applied' if count else 'up to date'}")
        if problem := moved_storage_problem() or storage_claim_problem():
            raise PreflightError(problem)
        # After a kill of the server, web answers before the new workers have started.
        for base_model in base_models():
            workers_reap(queue=base_model.queue, crashed=crashed)
        accounts = first_accounts_ensure()
        connection.close()
        if accounts.admin_password:
            self.say(f"admin     login {ADMIN_USERNAME}, password {accounts.admin_password}")
        if accounts.api_key:
            self.say(f"api key   {accounts.api_key} (user {LOCAL_USERNAME})")
        if accounts.admin_password or accounts.api_key:
            self.say("          these secrets are shown this once: write them down")

    def _start_web(self, environment: dict[str, str]) -> None:
        settings.STATIC_ROOT.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "granian", "tinkerapi.asgi:application"),
            *("--interface", "asginl", "--http", "1", "--no-ws"),
            *("--host", self.server.host, "--port", str(self.server.port)),
            *("--workers", str(settings.WEB_PROCESSES)),
            *("--backlog", str(OPEN_REQUESTS), "--backpressure", str(OPEN_REQUESTS)),
            *("--static-path-route", settings.STATIC_URL.rstrip("/")),
            *("--static-path-mount", str(settings.STATIC_ROOT)),
            *("--workers-kill-timeout", str(WEB_KILL_SECONDS), "--log-level", "warning"),
        ]
        web = {**environment, "TINKERAPI_ROLE": "web"}
        self.supervisor.add(
            Child(
                "web",
                command,
                web,
                log_path("web"),
                WEB_STOP_SECONDS,
                parent_death_signal="TERM",
                stop_rank=0,  # first, so that a stopping server accepts no requests
            )
        )

    def _start_webhook(self, environment: dict[str, str]) -> None:
        """The process that sends events, where a receiver is set."""
        if settings.WEBHOOK is None:
            return
        self.say(f"webhook   {settings.WEBHOOK.host}: {', '.join(settings.WEBHOOK.events)}")
        self.supervisor.add(
            Child(
                "webhook",
                [sys.executable, "-m", "tinkerapi", "webhook"],
                environment,
                log_path("webhook"),
                WEBHOOK_STOP_SECONDS,
                parent_death_signal="KILL",  # an attempt that was cut off is repeated
                stop_rank=0,
            )
        )

    def _start_workers(self, base_model: ServedBaseModel, environment: dict[str, str]) -> None:
        if base_model.config.vllm is not None and base_model.config.vllm.python:
            vllm = VllmPart(base_model, environment)
            self.supervisor.add(vllm)
            self.say(f"vllm      {base_model.name}: starting its server; its log is {vllm.log}")
        for number in range(1, base_model.config.workers + 1):
            self.supervisor.add(worker_part(base_model, number, environment))

    def _supervise(self, environment: dict[str, str]) -> None:
        """Start workers when their models are ready, keep all running, report when they answer."""
        waiting = base_models()
        self.pruning = self._pruning(environment)
        answered = ready = False
        look_at = note_disk_at = 0.0
        restarts = 0
        while True:
            for base_model in [model for model in waiting if self._is_prepared(model)]:
                waiting.remove(base_model)
                self._start_workers(base_model, environment)
            self.supervisor.tick()
            if time.monotonic() >= note_disk_at:
                note_disk_at = time.monotonic() + NOTE_DISK_SECONDS
                disk_note(settings.DATA_DIR)
            if self.pruning is not None:
                self.pruning.tick()
            if ready and self.supervisor.restarts > restarts:
                ready, look_at = False, time.monotonic() + LOST_PART_SECONDS
            restarts = self.supervisor.restarts
            if not answered:
                if answered := self._answers("/healthz"):
                    self.say(f"web       answers after {self._seconds()}; the model is loading")
            elif not ready and not waiting and time.monotonic() >= look_at:
                look_at = time.monotonic() + READY_LOOK_SECONDS
                if ready := self._answers("/readyz"):
                    self._say_ready()
            time.sleep(TICK_SECONDS)

    def _pruning(self, environment: dict[str, str]) -> RepeatedCommand | None:
        """The command that deletes old payloads and results; None if the settings do not ask for
        it."""
        if not settings.PRUNE_HOURS:
            return None
        return RepeatedCommand(
            "pruning",
            [sys.executable, "-m", "tinkerapi", "prunefutures"],
            environment,
            log_path("pruning"),
            settings.DATA_DIR / "last_prune",
            settings.PRUNE_HOURS * 3600.0,
            self.say,
        )

    def _is_prepared(self, base_model: ServedBaseModel) -> bool:
        """Whether its folder exists; if it cannot be made, the process that tried has said why."""
        process = self.preparations.get(base_model.name)
        if process is None:
            return True
        status = process.poll()
        if status is None:
            return False
        del self.preparations[base_model.name]
        if status != 0:
            raise PreflightError(f"base model {base_model.name}: its folder could not be made")
        return True

    def _answers(self, path: str) -> bool:
        try:
            return self.server.answer(path, timeout_seconds=2) == HTTPStatus.OK
        except OSError:
            return False

    def _seconds(self) -> str:
        return f"{time.monotonic() - self.started_at:.1f} s"

    def _say_ready(self) -> None:
        """Print it once with all addresses, and briefly after each restart of a part."""
        if self.supervisor.has_been_ready:
            self.say("ready again")
            return
        self.supervisor.has_been_ready = True
        address = self.server.address
        self.say(f"ready after {self._seconds()}; Ctrl+C stops everything")
        self.say(f"  API     {address}/")
        self.say(f"  docs    {address}/docs/")
        self.say(f"  admin   {address}/admin/")
        self.say(f"  logs    {log_path('web').parent}")


def _require(option: str, value: float, minimum: float, maximum: float) -> None:
    if not minimum <= value <= maximum:  # excludes NaN too
        raise CommandError(f"{option}: expected {minimum:g} to {maximum:g}, got {value}")


def _can_be_prepared(base_model: ServedBaseModel) -> bool:
    """Whether to make the folder: it is in the data folder and does not exist yet."""
    is_ours = base_model.folder.is_relative_to(settings.DATA_DIR / "models")
    return is_ours and not base_model.folder.exists()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
