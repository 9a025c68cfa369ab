"""The processes of a server with a vLLM server beside it: whose they are, and what they use."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.server import Server, processor_seconds

CLIENT, OURS, THEIRS = "the clients", "our processes", "vLLM's processes"
_OTHER = "our other processes"

_COMMANDS = {"granian": "web", "engineworker": "the worker", "postgres": "Postgres"}
PARTS = (*_COMMANDS.values(), _OTHER)
"""Of ``OURS``."""


def vllm_processes(server: Server) -> set[int]:
    """Ids of vLLM's API server and of all processes below it."""
    found: set[int] = set()
    for process in server.processes():  # parents before children
        if process.parent in found or "vllm.entrypoints" in process.command:
            found.add(process.pid)
    return found


def used_seconds(server: Server) -> dict[str, float]:
    """Processor seconds until now, by ``CLIENT`` (this process), ``OURS`` and ``THEIRS``, and of
    ours also by each of ``PARTS``."""
    assert server.process is not None
    theirs = vllm_processes(server)
    used = dict.fromkeys((CLIENT, OURS, *PARTS, THEIRS), 0.0)
    used[CLIENT] = time.process_time()
    used[_OTHER] = processor_seconds(server.process.pid)
    for process in server.processes():
        with suppress(OSError):  # it has ended since
            parts = [part for word, part in _COMMANDS.items() if word in process.command]
            part = THEIRS if process.pid in theirs else parts[0] if parts else _OTHER
            used[part] += processor_seconds(process.pid)
    used[OURS] = sum(used[part] for part in PARTS)
    return used


@contextmanager
def vllm_on_cores_of_its_own(server: Server) -> Iterator[None]:
    """vLLM on one half of the cores, and ours and this process on the other."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    assert half, "needs two cores"
    theirs = vllm_processes(server)
    ours = {process.pid for process in server.processes()} - theirs | {os.getpid()}
    _pin(theirs, set(cores[:half]))
    _pin(ours, set(cores[half:]))
    try:
        yield
    finally:
        _pin(theirs | ours, set(cores))


def _pin(pids: set[int], cores: set[int]) -> None:
    """Let all threads of some processes run on some cores only; later threads inherit it."""
    for pid in pids:
        with suppress(OSError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread.name), cores)
