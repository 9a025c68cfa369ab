"""A whole server in its own process, started as the README says: ``manage.py up``.

Used by the acceptance tests and by the benchmarks, so it knows neither pytest nor Django.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from tests.environment import command_environment

ROOT = Path(__file__).resolve().parents[1]
READY_SECONDS = 300.0  # the first start makes the model's folder
LOOK_SECONDS = 0.05  # between two looks whether it answers; what a start's measured time is off by

CONVERSATION = [{"role": "user", "content": "test"}, {"role": "assistant", "content": "passed"}]

Json = dict[str, Any]


class ServerFailed(Exception):
    """The server did not do in time what it was waited for; the message ends with its log."""


@dataclass(frozen=True)
class Process:
    """One line of the process table."""

    pid: int
    memory_bytes: int
    """Resident, shared pages included."""
    command: str


@dataclass
class Server:
    """``manage.py up`` in its own process, on its own data folder and port."""

    data_dir: Path
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    root: Path = ROOT
    """The checkout that is started."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    def start(self) -> None:
        """Start and wait until a worker takes requests."""
        self.spawn()
        self.wait_until("/readyz")

    def spawn(self) -> None:
        """Start and return at once."""
        with (self.data_dir / "up.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "manage.py", "up", "--port", str(self.port)],
                cwd=self.root,
                env=self.full_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def full_environment(self) -> dict[str, str]:
        """Of ``up``, and of any other command on this server's data folder."""
        return command_environment(self.data_dir, self.environment)

    def wait_until(self, path: str) -> None:
        """Return as soon as a GET of ``path`` is answered with 200.

        Raises:
            ServerFailed: It ended, or took longer than READY_SECONDS.
        """
        assert self.process is not None
        deadline = time.monotonic() + READY_SECONDS
        while not self.answers(path):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise ServerFailed(f"up did not get to {path}:\n{self.log()}")
            time.sleep(LOOK_SECONDS)

    def answers(self, path: str) -> bool:
        try:
            return requests.get(f"{self.url}{path}", timeout=5).status_code == 200
        except (requests.ConnectionError, requests.Timeout):  # a busy machine, or nobody
            return False

    def is_ready(self) -> bool:
        """Whether a worker takes requests."""
        return self.answers("/readyz")

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=READY_SECONDS)
            self.process = None

    def kill(self) -> None:
        """SIGKILL ``up`` and wait until everything below it has followed.

        Until then the old web process may still answer for the new one.
        """
        assert self.process is not None
        below = [item.pid for item in self.processes()]
        self.process.kill()
        self.process.wait()
        self.process = None
        deadline = time.monotonic() + READY_SECONDS
        while any(Path(f"/proc/{pid}").exists() for pid in below):
            if time.monotonic() > deadline:
                raise ServerFailed(f"processes outlive their killed up:\n{self.log()}")
            time.sleep(LOOK_SECONDS)

    def log(self) -> str:
        return (self.data_dir / "up.log").read_text(errors="replace")

    def processes(self) -> list[Process]:
        """Everything below ``up``."""
        assert self.process is not None
        listing = subprocess.run(
            ["/usr/bin/env", "ps", "-ww", "-A", "-o", "pid=,ppid=,rss=,args="],
            capture_output=True,
            text=True,
            check=True,
        )
        children: dict[int, list[Process]] = {}
        for line in listing.stdout.splitlines():
            pid, parent, kibibytes, command = line.split(maxsplit=3)
            process = Process(int(pid), int(kibibytes) * 1024, command)
            children.setdefault(int(parent), []).append(process)
        found = list(children.get(self.process.pid, []))
        for process in found:  # which grows meanwhile
            found += children.get(process.pid, [])
        return found

    def worker_pid(self) -> int:
        """The process that holds the model; django-q2 renames it where setproctitle is there."""
        [worker] = [
            item.pid
            for item in self.processes()
            if item.command.startswith("qcluster") or " engineworker " in item.command
        ]
        return worker

    def post(self, path: str, **body: Any) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, timeout=120)

    def retrieve(self, request_id: str, *, seconds: float = 120.0) -> requests.Response:
        """Ask as the quick reference does, but waiting, until the future is final."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            answer = self.post("/retrieve_future", request_id=request_id, wait=10)
            if answer.status_code != 202:
                return answer
        raise ServerFailed(f"{request_id} was not final after {seconds} s:\n{self.log()}")

    def submit_steps(self, model_id: str, steps: int, *, learning_rate: float) -> list[str]:
        """Queue ``steps`` forward_backwards with an optim_step each; return all request ids."""
        ids = []
        for _ in range(steps):
            for path, fields in (
                ("/api/v1/forward_backward_async", {"data": [CONVERSATION]}),
                ("/api/v1/optim_step_async", {"adam_params": {"learning_rate": learning_rate}}),
            ):
                answer = self.post(path, model_id=model_id, **fields)
                assert answer.status_code == 200, answer.text
                ids.append(answer.json()["request_id"])
        return ids

    def results(self, ids: list[str]) -> list[Json]:
        """What all of these became, which must be ready."""
        answers = [self.retrieve(request_id) for request_id in ids]
        assert [answer.status_code for answer in answers] == [200] * len(ids)
        return [answer.json() for answer in answers]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
