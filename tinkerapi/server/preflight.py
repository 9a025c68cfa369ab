"""Checks that ``up`` makes before it starts anything; each failure has a clear message.

The data folder is ours and no other ``up`` runs on it, the port is free, the base models'
folders can be read, and the secret that signs links and queue entries exists.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from training.model_folder import model_folder_problem

LOCK_FILE = "up.lock"


class PreflightError(Exception):
    """The server cannot be started; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class RunningServer:
    """The ``up`` that holds a data folder, read from its lock file."""

    pid: int
    host: str
    port: int

    @property
    def address(self) -> str:
        """Its address on this machine: a server on all addresses is also on loopback."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def answer(self, path: str, *, timeout_seconds: float) -> int:
        """Status code of a GET request, whatever hosts the server allows.

        Raises:
            OSError: No answer, or not in HTTP.
        """
        # A proxy set in the environment would not reach our loopback address.
        opener = build_opener(ProxyHandler({}))
        request = Request(self.address + path, headers={"Host": "localhost"})  # noqa: S310
        try:
            with opener.open(request, timeout=timeout_seconds) as answer:
                return int(answer.status)
        except HTTPError as error:
            return error.code
        except HTTPException as error:
            raise OSError(f"answered nonsense: {error!r}") from error


@contextmanager
def lock_data_folder(data_dir: Path, server: RunningServer) -> Iterator[RunningServer | None]:
    """Hold the data folder for a server; yields the previous server if that was killed.

    Raises:
        PreflightError: It cannot be written, or another ``up`` has it.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Append mode: opening must not empty the file that names the other process.
        lock = (data_dir / LOCK_FILE).open("a+")
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
        raise PreflightError(
            f"the data folder {data_dir} cannot be written ({reason}); "
            "set TINKERAPI_DATA_DIR to a folder of yours"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = _read_lock(lock)
            raise PreflightError(
                f"this server is already running on {data_dir}"
                + (f" (process {other.pid}, {other.address})" if other else "")
                + "; stop it first, or set another TINKERAPI_DATA_DIR"
            ) from None
        killed = _read_lock(lock)
        lock.truncate(0)
        lock.write(json.dumps(asdict(server)))
        lock.flush()
        try:
            yield killed
        finally:
            lock.truncate(0)  # a normal end: the next start need not wait for anything


def running_server(data_dir: Path) -> RunningServer | None:
    """The ``up`` that runs on this data folder, or None; the check does not affect it."""
    try:
        lock = (data_dir / LOCK_FILE).open()
    except OSError:
        return None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read_lock(lock)
    return None


def _read_lock(lock: IO[str]) -> RunningServer | None:
    lock.seek(0)
    try:
        return RunningServer(**json.load(lock))
    except (ValueError, TypeError):  # its owner has not written it yet
        return None


def keep_secret_key(data_dir: Path) -> str:
    """The secret kept in the data folder, made at the first call; only this user may read it.

    Raises:
        PreflightError: It exists and cannot be read, or is empty.
    """
    path = data_dir / "secret_key"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    else:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(50) + "\n")
    try:
        secret = path.read_text().strip()
    except OSError as error:
        raise PreflightError(f"{path} cannot be read: {error.strerror}") from error
    if not secret:
        raise PreflightError(f"{path} is empty; remove it and a new secret is made")
    return secret


def resolve_host(host: str) -> str:
    """The IP address of ``host``, to which the web server binds.

    ``localhost`` is 127.0.0.1 even if the resolver gives ::1 first: more clients try it.

    Raises:
        PreflightError: It has none.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise PreflightError(f"--host {host}: {error.strerror}") from error
    except UnicodeError as error:
        raise PreflightError(f"--host {host}: this is not a host name") from error
    addresses = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    return str(addresses[0][4][0])


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach a server bound to this IP address."""
    return ipaddress.ip_address(address).is_loopback


def check_port(host: str, port: int, *, wait_seconds: float = 0.0) -> None:
    """Make sure that a server can listen there.

    Args:
        wait_seconds: How long to wait for a port, which children of a killed server may still hold.

    Raises:
        PreflightError: Taken, not allowed, or no such address.
    """
    deadline = time.monotonic() + wait_seconds
    while (problem := _port_problem(host, port)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if problem:
        raise PreflightError(
            f"cannot listen on {host} port {port}: {problem.strerror}; choose another --port"
        ) from problem


def _port_problem(host: str, port: int) -> OSError | None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        return error
    return None


def base_model_problem(folder: Path) -> str | None:
    """Why a base model's folder cannot be loaded, as one sentence; None if no problem is found."""
    try:
        if problem := model_folder_problem(folder):
            return problem
        names = {path.name for path in folder.iterdir()}
        for name in sorted(names):
            if (folder / name).is_file():
                (folder / name).open("rb").close()
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        return f"{folder} has no tokenizer (tokenizer.json)"
    return None
