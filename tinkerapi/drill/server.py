"""``manage.py up`` in a scratch folder, and its child processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from tinkerapi.server.postgres import embedded_database
from tinkerapi.server.preflight import RunningServer
from tinkerapi.settings import BASE_DIR
from training.parent_death import parent_death_prefix

READY_SECONDS = 300.0
STOP_SECONDS = 150.0
LOOK_SECONDS = 0.05
HOST = "127.0.0.1"
COMPUTING = ("DEVICE", "DTYPE", "NUM_THREADS", "BATCH_TOKENS", "CACHE_TOKENS")
"""The settings that a drilled server takes from this process: those of the computation. Limits,
keys and addresses have their defaults, whatever the operator has set."""


class ServerFailed(Exception):
    """The server did not react in time; the message names its log."""


@dataclass(frozen=True)
class Process:
    """One line of the process table."""

    pid: int
    parent: int
    command: str


@dataclass
class DrilledServer:
    """One data folder, and the server that runs on it now."""

    data_dir: Path
    environment: Mapping[str, str]
    port: int = field(default_factory=lambda: _free_port())
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start ``up`` and return at once; call it from the main thread.

        It ends when this process ends, in any way, and its parts end with it.
        """
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with (self.data_dir / "up.log").open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603
                [
                    *parent_death_prefix("TERM"),
                    *(sys.executable, "-m", "tinkerapi", "up"),
                    *("--host", HOST, "--port", str(self.port)),
                    # Dozens of kills in a minute do not mean that a part is broken.
                    *("--max-restart-delay", "0.5"),
                ],
                cwd=BASE_DIR,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # Ctrl+C goes to the drill, which stops the server
            )

    def wait_until_ready(self) -> None:
        """Return once a worker takes requests. Raises ServerFailed."""
        deadline = time.monotonic() + READY_SECONDS
        while not self._is_ready():
            if self.has_ended() or time.monotonic() > deadline:
                raise ServerFailed(f"the server did not get ready; see {self.data_dir}/up.log")
            time.sleep(LOOK_SECONDS)

    def has_ended(self) -> bool:
        """Whether ``up`` is gone."""
        return self.process is None or self.process.poll() is not None

    def stop(self) -> None:
        """Stop it cleanly, as Ctrl+C does; kill it if that takes too long."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        self.process = None

    def kill(self) -> None:
        """SIGKILL ``up``; its child processes end by themselves."""
        if self.process is not None:
            self.process.kill()

    def processes(self) -> list[Process]:
        """All descendants of ``up``, parents before children; empty if it does not run."""
        if self.process is None:
            return []
        listing = subprocess.run(
            ["/usr/bin/env", "ps", "-ww", "-A", "-o", "pid=,ppid=,args="],
            capture_output=True,
            text=True,
            check=True,
        )
        children: dict[int, list[Process]] = {}
        for line in listing.stdout.splitlines():
            pid, parent, command = line.split(maxsplit=2)
            children.setdefault(int(parent), []).append(Process(int(pid), int(parent), command))
        found = list(children.get(self.process.pid, []))
        for process in found:  # which grows during the loop
            found += children.get(process.pid, [])
        return found

    def command(self, *arguments: str) -> str:
        """The output of another ``manage.py`` command on this data folder."""
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "tinkerapi", *arguments],
            cwd=BASE_DIR,
            env=self._environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    def _environment(self) -> dict[str, str]:
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

    def _is_ready(self) -> bool:
        server = RunningServer(pid=0, host=HOST, port=self.port)
        try:
            return server.answer("/readyz", timeout_seconds=5) == 200
        except OSError:
            return False


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


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])
