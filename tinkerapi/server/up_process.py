"""``up`` in its own process, for programs that start servers: the crash drill, tests, benchmarks.

It loads neither settings nor Django, because the started server may be another checkout.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from tinkerapi.server.preflight import RunningServer

HOST = "127.0.0.1"
READY_SECONDS = 300.0
"""The first start makes the default model's folder."""

STOP_SECONDS = 300.0
LOOK_SECONDS = 0.05
"""Seconds between two checks whether it answers."""

ANSWER_SECONDS = 5.0
LOG_CHARACTERS = 8000
"""Characters of the log's end in an error."""

ROOT = Path(__file__).resolve().parents[2]


class ServerFailed(Exception):
    """The server did not react in time; the message ends with its log."""


@dataclass(frozen=True)
class Process:
    """One line of the process table."""

    pid: int
    parent: int
    memory_bytes: int
    """Resident, shared pages included."""
    command: str


def free_port() -> int:
    """A free port."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


@dataclass
class UpProcess:
    """One data folder, and the server that runs on it now."""

    data_dir: Path
    port: int = field(default_factory=free_port)
    environment: Mapping[str, str] = field(default_factory=dict)
    """The server's settings."""
    root: Path = ROOT
    """The checkout that is started."""
    process: subprocess.Popen[bytes] | None = None

    prefix: ClassVar[tuple[str, ...]] = ()
    """The words before the command."""
    options: ClassVar[tuple[str, ...]] = ()
    """The options of ``up`` beside its port."""
    own_group: ClassVar[bool] = False
    """Whether Ctrl+C goes only to the process that started it, which then stops it."""

    def full_environment(self) -> dict[str, str]:
        """The environment of ``up`` and of other commands on this data folder."""
        raise NotImplementedError

    def start(self) -> None:
        """Start and wait until a worker takes requests. Raises ServerFailed."""
        self.spawn()
        self.wait_until()

    def spawn(self) -> None:
        """Start and return at once."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with (self.data_dir / "up.log").open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603
                [*self.prefix, *self.command_line("up"), "--port", str(self.port), *self.options],
                cwd=self.root,
                env=self.full_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0 if self.own_group else None,
            )

    def wait_until(self, path: str = "/readyz") -> None:
        """Return as soon as a GET of ``path`` is answered with 200.

        Raises:
            ServerFailed: It ended, or took longer than READY_SECONDS.
        """
        deadline = time.monotonic() + READY_SECONDS
        while not self.answers(path):
            if self.has_ended() or time.monotonic() > deadline:
                said = self.log()[-LOG_CHARACTERS:]
                raise ServerFailed(f"up did not get to {path}; {self.data_dir}/up.log says\n{said}")
            time.sleep(LOOK_SECONDS)

    def answers(self, path: str) -> bool:
        """Whether a GET of ``path`` is answered with 200 now."""
        server = RunningServer(pid=0, host=HOST, port=self.port)
        try:
            return server.answer(path, timeout_seconds=ANSWER_SECONDS) == 200
        except OSError:  # a busy machine, or nobody
            return False

    def is_ready(self) -> bool:
        """Whether a worker takes requests."""
        return self.answers("/readyz")

    def has_ended(self) -> bool:
        """Whether ``up`` has ended."""
        return self.process is None or self.process.poll() is not None

    def stop(self) -> None:
        """Stop it cleanly, as Ctrl+C does; kill it if that takes too long."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def log(self) -> str:
        """The text that it has printed."""
        return (self.data_dir / "up.log").read_text(errors="replace")

    def processes(self) -> list[Process]:
        """All descendants of ``up``, parents before children; empty if it does not run."""
        if self.process is None:
            return []
        listing = subprocess.run(
            ["/usr/bin/env", "ps", "-ww", "-A", "-o", "pid=,ppid=,rss=,args="],
            capture_output=True,
            text=True,
            check=True,
        )
        children: dict[int, list[Process]] = {}
        for line in listing.stdout.splitlines():
            pid, parent, kibibytes, command = line.split(maxsplit=3)
            process = Process(int(pid), int(parent), int(kibibytes) * 1024, command)
            children.setdefault(int(parent), []).append(process)
        found = list(children.get(self.process.pid, []))
        for process in found:  # which grows during the loop
            found += children.get(process.pid, [])
        return found

    def command(self, *arguments: str) -> str:
        """The output of another of our commands on this data folder."""
        done = subprocess.run(  # noqa: S603
            self.command_line(*arguments),
            cwd=self.root,
            env=self.full_environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    def command_line(self, *arguments: str) -> list[str]:
        """The command line of one of our commands."""
        return [sys.executable, "-m", "tinkerapi", *arguments]
