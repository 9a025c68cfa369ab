"""A whole server in its own process, started as the README says: ``manage.py up``.

Used by the acceptance tests and by the benchmarks, so it knows neither pytest nor Django.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests

from tests.environment import command_environment
from tinkerapi.server.up_process import (
    LOOK_SECONDS,
    READY_SECONDS,
    ROOT,
    ServerFailed,
    UpProcess,
    free_port,
)

__all__ = ["CONVERSATION", "ROOT", "Json", "Server", "ServerFailed", "free_port"]

CONVERSATION = [{"role": "user", "content": "test"}, {"role": "assistant", "content": "passed"}]

Json = dict[str, Any]


def processor_seconds(pid: int, *, with_ended_children: bool = False) -> float:
    """Processor time that a process has used, in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own, of_children = slice(11, 13), slice(13, 15)
    ticks = sum(map(int, fields[own]))
    if with_ended_children:
        ticks += sum(map(int, fields[of_children]))
    return ticks / os.sysconf("SC_CLK_TCK")


class Server(UpProcess):
    """``manage.py up`` in its own process, on its own data folder and port."""

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    def full_environment(self) -> dict[str, str]:
        """The environment of ``up`` and of other commands on this server's data folder."""
        return command_environment(self.data_dir, self.environment)

    def command_line(self, *arguments: str) -> list[str]:
        return [sys.executable, "manage.py", *arguments]

    def manage(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command beside this server, on its data folder."""
        return subprocess.run(
            self.command_line(*arguments),
            cwd=ROOT,
            env=self.full_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

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

    def worker_pid(self) -> int:
        """The process that holds the model; django-q2 renames it where setproctitle is there."""
        [worker] = [
            item.pid
            for item in self.processes()
            if item.command.startswith("qcluster") or " engineworker " in item.command
        ]
        return worker

    def processor_seconds(self) -> float:
        """Processor time that ``up`` and everything below it have used, with ended children."""
        assert self.process is not None
        living = [self.process.pid, *(item.pid for item in self.processes())]
        return sum(processor_seconds(pid, with_ended_children=True) for pid in living)

    def post(self, path: str, /, **body: Any) -> requests.Response:
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
        """The results of all of these futures, which must be ready."""
        answers = [self.retrieve(request_id) for request_id in ids]
        assert [answer.status_code for answer in answers] == [200] * len(ids)
        return [answer.json() for answer in answers]
