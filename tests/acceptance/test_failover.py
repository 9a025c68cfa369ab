"""A Postgres of the operator's own with a synchronous standby: the primary dies in the middle of
training, the standby is promoted, and every accepted request gets its answer.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests

from tests.server import Server, free_port
from tests.tiny_model import make_tiny_model
from tests.waiting import LONG_SECONDS, wait_for
from tinkerapi.server.postgres_cluster import PostgresCluster

pytestmark = pytest.mark.acceptance

STEPS = 12
DATABASE = "training"


class Node:
    """A Postgres on the loopback address, which any program of this machine may use."""

    def __init__(self, folder: Path) -> None:
        self._cluster = PostgresCluster(folder, durable=True)
        self._binaries = self._cluster.choose_binaries()
        self.path = self._cluster.path
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def make(self) -> None:
        self._cluster.prepare_folders()
        self._cluster.make(self._binaries)

    def make_standby_of(self, primary: Node) -> None:
        """Copy a running primary, and follow it once started."""
        self._cluster.prepare_folders()
        address = f"host=127.0.0.1 port={primary.port} user=postgres application_name=standby"
        self._run("pg_basebackup", f"--pgdata={self.path}", "--write-recovery-conf", f"-d{address}")

    def start(self, **settings: str) -> None:
        command = [
            *(*self._cluster.privileges("KILL"), str(self._binaries.folder / "postgres")),
            *("-D", str(self.path), "-h", "127.0.0.1", "-k", "", "-p", str(self.port)),
            *(f"--{name}={value}" for name, value in settings.items()),
        ]
        with (self.path.parent / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd="/", stdout=log, stderr=log)
        wait_for(self._answers)

    def promote(self) -> None:
        self._run("pg_ctl", "promote", f"--pgdata={self.path}")

    def kill(self) -> None:
        """As if its machine had lost power, except that its files are not lost."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)  # all its processes end at once
            self._process.wait()
            self._process = None

    def asked(self, query: str, database: str = "postgres") -> Any:
        """The first value of a query's answer; None if there is none."""
        with closing(self._connect(database)) as connection:
            cursor = connection.execute(query)
            row = cursor.fetchone() if cursor.description else None
            return row[0] if row else None

    def _connect(self, database: str) -> psycopg.Connection[Any]:
        address = f"host=127.0.0.1 port={self.port} user=postgres dbname={database}"
        return psycopg.connect(address, autocommit=True)

    def _answers(self) -> bool:
        try:
            self._connect("postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._cluster.privileges(None), str(self._binaries.folder / program)]
        subprocess.run([*command, *arguments], cwd="/", check=True, capture_output=True)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """A primary and its standby, which confirms each commit."""
    primary, standby = Node(tmp_path / "primary"), Node(tmp_path / "standby")
    try:
        primary.make()
        primary.start(synchronous_standby_names="standby")
        standby.make_standby_of(primary)
        standby.start()
        followed = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
        wait_for(lambda: primary.asked(followed))
        primary.asked(f"CREATE DATABASE {DATABASE}")
        yield primary, standby
    finally:
        standby.kill()
        primary.kill()


def test_no_accepted_request_is_lost_when_the_standby_takes_over(
    nodes: tuple[Node, Node], start_server: Callable[..., Server], tmp_path: Path
) -> None:
    primary, standby = nodes
    server = start_server(
        DATABASE_URL=f"postgresql://postgres@/{DATABASE}?host=127.0.0.1,127.0.0.1"
        f"&port={primary.port},{standby.port}&target_session_attrs=read-write",
        TINKERAPI_BASE_MODEL=str(make_tiny_model(tmp_path / "tiny")),
        TINKERAPI_NUM_THREADS="1",
    )

    for model_id in ("undisturbed", "working", "waiting", "after"):
        server.post("/api/v1/add_lora", model_id=model_id, rank=4, seed=1)

    def submit(model_id: str) -> list[str]:
        return server.submit_steps(model_id, STEPS, learning_rate=0.01)

    def losses(request_ids: list[str]) -> list[Any]:
        return [result["loss"] for result in server.results(request_ids)[::2]]

    expected = losses(submit("undisturbed"))
    worker = server.worker_pid()
    accepted = submit("working")
    os.kill(worker, signal.SIGSTOP)
    accepted_too = submit("waiting")
    primary.kill()
    os.kill(worker, signal.SIGCONT)
    while_down = server.post("/api/v1/add_lora", model_id="refused", rank=4)
    assert while_down.status_code == 503
    standby.promote()

    wait_for(lambda: requests.get(f"{server.url}/readyz", timeout=LONG_SECONDS).status_code == 200)
    assert losses(accepted) == expected
    assert losses(accepted_too) == expected
    assert losses(submit("after")) == expected
