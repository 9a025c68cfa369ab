"""Checks each part of an installation, running or not, and reports problems.

Every check is a function that returns findings and never raises; a part that cannot be checked
because no server runs is reported as off, which is not a failure. Torch is imported in a
separate process, so that a broken installation of it is a finding too.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from http import HTTPStatus
from importlib import metadata
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import DatabaseError, OperationalError, connection
from django.db.models import Count, Min
from django.template.defaultfilters import pluralize
from django.utils import timezone
from packaging.requirements import Requirement

from futures.models import Future, Worker
from futures.selectors import HEARTBEAT_TIMEOUT
from futures.transitions import State
from tinkerapi.deliveries import last_tried
from tinkerapi.models import ApiKey
from tinkerapi.server.joining import (
    clock_difference_seconds,
    clock_problem,
    environment_problems,
    storage_problem,
)
from tinkerapi.server.postgres_cluster import MINIMUM_FREE_BYTES
from tinkerapi.server.preflight import RunningServer, base_model_problem, running_server
from tinkerapi.server.upgrade import SchemaError, database_down_reason, unapplied_migrations
from training.base_models import DEFAULT_MODEL_NAME, ServedBaseModel, base_models
from training.devices import count_cores, device_of
from training.errors import DeviceNotFound, StorageFailed
from training.storage.chosen import storage

DEVICE_TIMEOUT_SECONDS = 120.0  # importing torch from a cold disk
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")

DEVICE_PROGRAM = """
import json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({
    "torch": torch.__version__,
    "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus],
}))
"""


class Verdict(Enum):
    OK = "ok"
    OFF = "off"
    """Not running, or not checked because another part is not running."""
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    part: str
    verdict: Verdict
    detail: str
    """The result of the check and, if it failed, what to do."""


def examine() -> Iterator[Finding]:
    """Check everything, in the order of dependencies."""
    yield from check_packages()
    yield check_data_folder()
    for base_model in base_models():
        yield check_base_model(base_model)
    yield check_device()
    server = running_server(settings.DATA_DIR)
    yield check_server(server)
    database = check_database(server)
    yield database
    if database.verdict is Verdict.OK:
        schema = check_schema()
        yield schema
        if schema.verdict is Verdict.OK:
            yield check_clock()
            yield check_storage()
            for base_model in base_models():
                yield from check_workers(base_model, server)
            yield check_queue()
            yield check_api_keys()
            yield from check_webhook()


def check_packages() -> Iterator[Finding]:
    """Python, and every package this project requires, in an allowed version."""
    yield Finding("python", Verdict.OK, sys.version.split()[0])
    try:
        requirements = [Requirement(line) for line in metadata.requires("tinkerapi") or []]
    except metadata.PackageNotFoundError:
        yield Finding("packages", Verdict.FAILED, "not installed; run `pip install -e .`")
        return
    wrong, versions = [], {}
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is missing")
            continue
        versions[requirement.name] = version
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} is wanted, {version} is installed")
    if wrong:
        yield Finding("packages", Verdict.FAILED, "; ".join(wrong) + "; run `pip install -e .`")
        return
    main = ("django", "django-q2", "granian", "torch", "transformers", "peft")
    listed = ", ".join(f"{name} {versions[name]}" for name in main if name in versions)
    yield Finding("packages", Verdict.OK, f"all {len(versions)} fit; {listed}")


def check_data_folder() -> Finding:
    """It exists or can be made, can be written, and its disk has room."""
    folder = settings.DATA_DIR
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    room = f"{free / 2**30:.1f} GiB free"
    try:
        probe = existing / f".doctor-{timezone.now():%s}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        detail = f"{existing}: {error.strerror}; set TINKERAPI_DATA_DIR to a folder of yours"
        return Finding("data folder", Verdict.FAILED, detail)
    if free < MINIMUM_FREE_BYTES:
        detail = f"{folder}: only {room}; make room, or move it with TINKERAPI_DATA_DIR"
        return Finding("data folder", Verdict.FAILED, detail)
    made = "" if folder.exists() else ", `manage.py up` will make it"
    return Finding("data folder", Verdict.OK, f"{folder}, {room}{made}")


def check_base_model(base_model: ServedBaseModel) -> Finding:
    """Its folder has configuration, tokenizer and weights that this user can read."""
    part = f"model {base_model.name}"
    problem = base_model_problem(base_model.folder)
    if problem is None:
        return Finding(part, Verdict.OK, str(base_model.folder))
    if base_model.config.path == DEFAULT_MODEL_NAME and not base_model.folder.exists():
        return Finding(part, Verdict.OFF, "not made yet; `manage.py up` makes it")
    return Finding(part, Verdict.FAILED, f"{problem}; correct its path or the folder")


def check_device() -> Finding:
    """Torch can be imported, and has the base models' devices."""
    command = [sys.executable, "-c", DEVICE_PROGRAM]
    try:
        answer = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=DEVICE_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding("device", Verdict.FAILED, "importing torch did not end; reinstall torch")
    if answer.returncode != 0:
        reason = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        return Finding("device", Verdict.FAILED, f"torch cannot be used: {reason}")
    figures = json.loads(answer.stdout)
    for config in settings.BASE_MODELS:
        try:
            for number in range(config.num_processes):
                device_of(
                    config, number, among=settings.BASE_MODELS, gpu_count=len(figures["gpus"])
                )
        except DeviceNotFound as error:
            return Finding("device", Verdict.FAILED, str(error))
    if figures["gpus"]:
        return Finding("device", Verdict.OK, "; ".join(figures["gpus"]))
    threads = settings.NUM_THREADS or count_cores()
    detail = "CPU, " if settings.NUM_THREADS else "CPU, up to "
    detail += f"{threads} thread{pluralize(threads)} for a worker"
    if flags := [flag for flag in CPU_FLAGS if flag in _cpu_flags()]:
        detail += f"; it has {', '.join(flags)}"
    return Finding("device", Verdict.OK, detail)


def check_server(server: RunningServer | None) -> Finding:
    """Whether ``up`` runs on this data folder and its web process answers."""
    if server is None:
        return Finding("server", Verdict.OFF, "not running here; start it with `manage.py up`")
    try:
        status = server.answer("/healthz", timeout_seconds=5)
        if status == HTTPStatus.OK:
            return Finding("server", Verdict.OK, f"{server.address}, process {server.pid}")
        reason = f"status {status}"
    except OSError as error:
        reason = str(error)
    log = settings.DATA_DIR / "logs" / "web.log"
    detail = f"process {server.pid} runs, but {server.address}/healthz: {reason}; see {log}"
    return Finding("server", Verdict.FAILED, detail)


def check_database(server: RunningServer | None) -> Finding:
    """Postgres can be reached; without ``up`` the embedded one is off, not broken."""
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_size_pretty(pg_database_size(current_database()))")
            size = cursor.fetchone()[0]
    except OperationalError as error:
        if not settings.DATABASE_URL and server is None:
            return Finding("postgres", Verdict.OFF, "the embedded one runs with `manage.py up`")
        reason = database_down_reason(error) or str(error).splitlines()[0]
        return Finding("postgres", Verdict.FAILED, reason)
    major, minor = divmod(connection.pg_version, 10000)  # type: ignore[attr-defined]
    return Finding("postgres", Verdict.OK, f"{major}.{minor}, database of {size}")


def check_schema() -> Finding:
    """The tables are those of this version."""
    try:
        count = unapplied_migrations()
    except SchemaError as error:
        return Finding("tables", Verdict.FAILED, str(error))
    if count:
        detail = f"{count} migrations are missing; restart `manage.py up`, which applies them"
        return Finding("tables", Verdict.FAILED, detail)
    return Finding("tables", Verdict.OK, "up to date")


def check_workers(base_model: ServedBaseModel, server: RunningServer | None) -> Iterator[Finding]:
    """Processes serve this base model, have sent heartbeats recently, and one of this machine could
    work beside them."""
    part = f"worker {base_model.name}"
    workers = Worker.objects.filter(queue=base_model.queue, state__in=["starting", "live"])
    logs = settings.DATA_DIR / "logs"
    log = logs / f"{base_model.queue}.log"
    if base_model.config.workers > 1:
        log = logs / f"{base_model.queue}.*.log"
    if not workers.exists():
        verdict = Verdict.OFF if server is None else Verdict.FAILED
        yield Finding(part, verdict, f"none is running; see {log}")
        return
    for worker in workers.order_by("id"):
        yield _worker_finding(part, worker, log)
    problems = environment_problems(base_model)
    if problems:
        yield Finding(part, Verdict.FAILED, "; ".join(problems))


def _worker_finding(part: str, worker: Worker, log: Path) -> Finding:
    age = timezone.now() - worker.heartbeat_at
    where = f"process {worker.pid}"
    if worker.hostname != socket.gethostname():
        where += f" on {worker.hostname}"
    if age > HEARTBEAT_TIMEOUT:
        detail = f"{where} has been silent for {age.total_seconds():.0f} s; see {log}"
        return Finding(part, Verdict.FAILED, detail)
    detail = f"{worker.state}, {where}, heartbeat {age.total_seconds():.0f} s ago"
    if layout := worker.figures.get("layout"):
        detail += f", {layout} layout"
    fault = worker.figures.get("conversation_fault")
    if fault:
        detail += f"; takes no conversations to train on: {fault}"
    if vllm := worker.figures.get("vllm"):
        words, is_used = _vllm_in_words(vllm)
        return Finding(part, Verdict.OK if is_used else Verdict.FAILED, f"{detail}; {words}")
    return Finding(part, Verdict.OK, detail)


def _vllm_in_words(figures: Mapping[str, Any]) -> tuple[str, bool]:
    """What a worker says of its vLLM server, and whether the server is used."""
    is_used = figures.get("state") == "ready"
    words = f"vLLM: {figures.get('state')}"
    differences = figures.get("differences") or {}
    if is_used and differences:
        listed = (
            f"{what} {'unknown' if value is None else format(value, '.1g')}"
            for what, value in differences.items()
        )
        words += f", differences in nats: {', '.join(listed)}"
    if not is_used:
        words += "; the built-in sampler takes its requests"
    return words, is_used


def check_clock() -> Finding:
    """This machine's clock is that of Postgres."""
    if problem := clock_problem():
        return Finding("clock", Verdict.FAILED, problem.removeprefix("clock: "))
    difference = abs(clock_difference_seconds())
    return Finding("clock", Verdict.OK, f"{difference:.1f} s from that of Postgres")


def check_storage() -> Finding:
    """Checkpoints and snapshots can be stored, and the storage is that of the workers in the
    database."""
    where = storage().location if storage().is_remote else "this data folder"
    try:
        is_new = storage().installation_id() is None
    except StorageFailed:
        is_new = False
    problem = storage().problem() if is_new else storage_problem()
    if problem:
        detail = problem.removeprefix("data folder: ").removeprefix("storage: ")
        return Finding("storage", Verdict.FAILED, detail)
    if is_new:
        return Finding("storage", Verdict.OFF, f"no server has run on {where} yet")
    if storage().is_remote:
        return Finding("storage", Verdict.OK, f"{where}, that of the workers")
    return Finding("storage", Verdict.OK, "the data folder is that of the workers")


def check_queue() -> Finding:
    """Requests wait only in queues that a worker serves."""
    queues = (
        Future.objects.filter(state=State.PENDING)
        .values("queue")
        .annotate(count=Count("pk"), oldest=Min("created_at"))
        .order_by("queue")
    )
    served = {base_model.queue for base_model in base_models()}
    lines, orphaned = [], False
    for queue in queues:
        age = timedelta(seconds=round((timezone.now() - queue["oldest"]).total_seconds()))
        lines.append(f"{queue['count']} wait on {queue['queue']}, the oldest for {age}")
        orphaned = orphaned or queue["queue"] not in served
    if orphaned:
        lines.append(
            "the base model of a queue is not served any more; add it to TINKERAPI_BASE_MODEL again"
        )
    verdict = Verdict.FAILED if orphaned else Verdict.OK
    return Finding("queue", verdict, "; ".join(lines) or "nothing waits")


def check_api_keys() -> Finding:
    """There is a way to authenticate."""
    try:
        count = sum(key.is_valid for key in ApiKey.objects.select_related("user"))
    except DatabaseError as error:
        return Finding("API keys", Verdict.FAILED, str(error).splitlines()[0])
    if count == 0 and settings.REQUIRE_API_KEY:
        detail = "keys are required and none is valid; run `manage.py createapikey USER`"
        return Finding("API keys", Verdict.FAILED, detail)
    return Finding("API keys", Verdict.OK, f"{count} valid")


def check_webhook() -> Iterator[Finding]:
    """The receiver of events has taken the last one; nothing if none is set."""
    if settings.WEBHOOK is None:
        return
    where, last = settings.WEBHOOK.host, last_tried()
    if last is None:
        yield Finding("webhook", Verdict.OFF, f"nothing was sent to {where} yet")
    elif last.last_error:
        detail = f"{where} did not take {last.event}: {last.last_error}; `webhook --test` tries it"
        yield Finding("webhook", Verdict.FAILED, detail)
    else:
        yield Finding("webhook", Verdict.OK, f"{where} took {last.event} of {last.at:%F %T %Z}")


def _cpu_flags() -> set[str]:
    """Instruction sets that Linux lists; empty on other systems."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            lines = [line for line in cpuinfo if line.startswith(("flags", "Features"))]
    except OSError:
        return set()
    return set(lines[0].partition(":")[2].split()) if lines else set()
