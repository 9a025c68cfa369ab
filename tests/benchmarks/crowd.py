"""Many clients of one server at once, and the state of the server's database and processes.

Knows nothing of Django: the database is read beside the server, as an operator would.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, LiteralString

import psycopg
from psycopg.conninfo import make_conninfo

from tests.benchmarks.report import Report, at_most
from tests.server import Server
from tinkerapi.server.postgres import embedded_database

MEBIBYTE = 2**20
CONNECTING = 64  # clients that connect at one time; the kernel's queue of connections is short
TIMEOUT_SECONDS = 540.0
WEB_MEBIBYTES, WORKER_MEBIBYTES = 512, 768
"""Memory limits of the parts; the worker with torch and a tiny model starts at about 420 MiB."""


@dataclass
class Answer:
    """The answer to one request."""

    status: int
    """0: no answer at all."""
    body: bytes
    seconds: float

    def json(self) -> Any:
        return json.loads(self.body)


class Crowd:
    """Clients of one server, each request on its own connection."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.gate = asyncio.Semaphore(CONNECTING)
        self.statuses: Counter[int] = Counter()

    async def ask(self, path: str, body: bytes, **headers: str) -> Answer:
        """POST, and the whole answer."""
        lines = {
            "Host": f"localhost:{self.port}",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            **headers,
        }
        head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        begin = time.monotonic()
        try:
            async with self.gate:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(head.encode() + b"\r\n" + body)
            await writer.drain()
            answer = await reader.read()
            writer.close()
        except OSError:
            answer = b""
        top, _, content = answer.partition(b"\r\n\r\n")
        status = int(top.split(b" ", 2)[1]) if top else 0
        self.statuses[status] += 1
        return Answer(status, content, time.monotonic() - begin)

    async def post(self, path: str, fields: dict[str, Any], **headers: str) -> Answer:
        return await self.ask(path, json.dumps(fields).encode(), **headers)


class Ledger:
    """The state in the server's database, read beside the server."""

    def __init__(self, server: Server) -> None:
        database: dict[str, Any] = {**embedded_database(server.data_dir)}
        names = {"host": "HOST", "user": "USER", "dbname": "NAME"}
        self._where = make_conninfo(**{key: str(database[name]) for key, name in names.items()})
        self._begin = self.requests()

    def _number(self, statement: LiteralString, *parameters: Any) -> int:
        with psycopg.connect(self._where) as connection:
            row = connection.execute(statement, parameters).fetchone()
        return int(row[0]) if row else 0

    def requests(self) -> int:
        """Futures that clients asked for: without the creations of models that came with them."""
        return self._number("SELECT count(*) FROM futures_future WHERE kind <> 'create_run'")

    def wrong_number(self, asked: int) -> int:
        """The difference between the requests since this ledger was opened and the number sent."""
        return abs(self.requests() - self._begin - asked)

    def wrong(self, request_ids: Sequence[str], *, answered: int = 0) -> int:
        """Accepted requests that are missing, not ready, or present twice; and those that nobody
        sent for since this ledger was opened.

        Args:
            answered: Requests beside these whose clients have their result already.
        """
        ready = self._number(
            "SELECT count(*) FROM futures_future WHERE id = ANY (%s) AND state = 'ready'",
            list(request_ids),
        )
        repeated = len(request_ids) - len(set(request_ids))
        return len(request_ids) - ready + repeated + self.wrong_number(len(request_ids) + answered)

    def wrong_steps(self, prefix: str, models: int, steps: int) -> int:
        """Models of this prefix that did not make this many optimizer steps, or are missing."""
        right = self._number(
            "SELECT count(*) FROM training_run WHERE name LIKE %s AND step = %s",
            f"{prefix}%",
            steps,
        )
        return abs(models - right)

    def worker_lives(self) -> int:
        """How often a worker was started; once, unless one died."""
        return self._number("SELECT count(*) FROM futures_worker")


@dataclass
class Memory:
    """Resident bytes of the server's processes, as seen from time to time."""

    web: list[int] = field(default_factory=list)
    worker: list[int] = field(default_factory=list)

    def look(self, server: Server) -> None:
        web = worker = 0
        for process in server.processes():
            if "granian" in process.command:
                web += process.memory_bytes
            elif process.command.startswith("qcluster") or " engineworker " in process.command:
                worker += process.memory_bytes
        self.web.append(web)
        self.worker.append(worker)


@contextmanager
def watched(server: Server, report: Report, part: str) -> Iterator[None]:
    """Report the memory of web and worker: before, and at most meanwhile or after."""
    memory, over = Memory(), threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            memory.look(server)

    memory.look(server)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    memory.look(server)
    for name, seen, bound in (
        ("web", memory.web, WEB_MEBIBYTES),
        ("worker", memory.worker, WORKER_MEBIBYTES),
    ):
        report.add(f"{part}: {name} memory before", [seen[0] / MEBIBYTE], unit="MiB")
        report.add(
            f"{part}: {name} memory at most",
            [max(seen) / MEBIBYTE],
            unit="MiB",
            goal=at_most(bound),
        )


@contextmanager
def stopped(pid: int) -> Iterator[Callable[[], None]]:
    """The process gets no processor time, until the end or until the function is called."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield lambda: os.kill(pid, signal.SIGCONT)
    finally:
        os.kill(pid, signal.SIGCONT)


def run(clients: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await clients

    return asyncio.run(bounded())
