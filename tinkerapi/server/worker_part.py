"""A worker process as a part of a supervisor."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from django.conf import settings

from tinkerapi.server.lost_workers import report_worker_end
from tinkerapi.server.supervisor import Child, Watch
from training.base_models import ServedBaseModel

WORKER_STOP_SECONDS = 120.0  # one batch; killing it sooner loses time, not work


def worker_part(
    base_model: ServedBaseModel, number: int, environment: Mapping[str, str], *, log_name: str = ""
) -> Child:
    """One of a base model's workers on this machine.

    Args:
        number: Of the worker, from 1 to the number of workers.
        environment: Of the process.
        log_name: Of its log file, without ending; the default names queue and number.
    """
    is_one_of_several = base_model.config.workers > 1
    command = [sys.executable, "-m", "tinkerapi", "engineworker"]
    return Child(
        f"worker {base_model.name}" + (f" {number}" if is_one_of_several else ""),
        [*command, "--base-model", base_model.name, "--number", str(number)],
        {**environment, "TINKERAPI_ROLE": "worker"},
        log_path(log_name or base_model.queue + (f".{number}" if is_one_of_several else "")),
        WORKER_STOP_SECONDS,
        parent_death_signal="KILL",  # a batch may be long, and a kill loses nothing
        stop_rank=1,
        watch=Watch("TINKERAPI_WATCHDOG_FD", silence_seconds=settings.HANG_SECONDS),
        refusal_status=os.EX_CONFIG,
        on_end=report_worker_end(base_model.queue),
    )


def part_environment(secret_key: str) -> dict[str, str]:
    """The environment that all parts of a server share."""
    # A checkout's parts run from that checkout, even if the package is installed too.
    checkout = str(settings.BASE_DIR) if settings.IS_CHECKOUT else ""
    python_path = [checkout, os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, python_path)),
        "PYTHONUNBUFFERED": "1",
        "TINKERAPI_DATA_DIR": str(settings.DATA_DIR),
        **_config_file(),
        "TINKERAPI_SECRET_KEY": secret_key,
    }


def _config_file() -> dict[str, str]:
    """The configuration file's absolute path, valid in every working directory."""
    name = os.environ.get("TINKERAPI_CONFIG", "")
    return {"TINKERAPI_CONFIG": str(Path(name).expanduser().resolve())} if name else {}


def log_path(name: str) -> Path:
    """The log file of a part of this server."""
    return Path(settings.DATA_DIR) / "logs" / f"{name}.log"
