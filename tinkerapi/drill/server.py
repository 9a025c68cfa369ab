"""``up`` in a scratch folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psycopg

from tinkerapi.server.postgres import embedded_database
from tinkerapi.server.up_process import HOST, UpProcess
from training.parent_death import parent_death_prefix

COMPUTING = ("DEVICE", "DTYPE", "LAYOUT", "NUM_THREADS", "BATCH_TOKENS", "CACHE_TOKENS")
"""The settings that a drilled server takes from this process: those of the computation. Limits,
keys and addresses have their defaults, whatever the operator has set."""


class DrilledServer(UpProcess):
    """One data folder, and the server that runs on it now; spawn it from the main thread.

    It ends when this process ends, in any way, and its parts end with it.
    """

    prefix = tuple(parent_death_prefix("TERM"))
    # Dozens of kills in a minute do not mean that a part is broken.
    options = ("--host", HOST, "--max-restart-delay", "0.5")
    own_group = True

    def kill(self) -> None:
        """SIGKILL ``up``; its child processes end by themselves."""
        if self.process is not None:
            self.process.kill()

    def full_environment(self) -> dict[str, str]:
        taken_over = {f"TINKERAPI_{name}" for name in COMPUTING}
        return {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith("TINKERAPI_") or name in taken_over
            },
            "DJANGO_SETTINGS_MODULE": "tinkerapi.settings",
            **self.environment,
            "TINKERAPI_DATA_DIR": str(self.data_dir),
        }


def connect(data_dir: Path) -> psycopg.Connection[Any]:
    """A connection to a server's Postgres, each statement in its own transaction.

    Raises:
        psycopg.OperationalError: It is down.
    """
    database = embedded_database(data_dir)
    return psycopg.connect(
        host=database["HOST"],
        port=database["PORT"],
        user=database["USER"],
        dbname=database["NAME"],
        autocommit=True,
    )
