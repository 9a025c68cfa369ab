"""Processes that turn requests' text into tokens, so that nobody waits for another user's text.

An owner has one process at a time. A process that ends fails only the request
that it was working on.
"""

from __future__ import annotations

import signal
from collections import deque
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from training.errors import LimitExceeded, TrainingError
from training.worker.text_process import Answer, TextTask, serve
from training.worker.text_work import Text

MOST_PROCESSES = 8
IDLE_PROCESSES = 2
"""Idle processes kept for the next request; further ones end when idle."""

_PRELOAD = [
    "training.worker.text_process",
    "training.engine.renderer.chat_renderer",
    "transformers.tokenization_utils_base",
]

_PRELOAD_FOR_IMAGES = ["training.engine.renderer.images.reader", "transformers.processing_utils"]
"""Also imported for a model that may read images; the second one imports torch."""

_CONTEXT = get_context("forkserver")
"""A small process that has imported the modules and forks itself: warm in milliseconds, and it
inherits nothing of the worker's: no connection to Postgres, no thread, no lock."""


def warm_up(folder: Path) -> None:
    """Start to import the processes' modules, in parallel to the caller's next work.

    Args:
        folder: The model's.
    """
    from multiprocessing.forkserver import ensure_running

    processors = ("processor_config.json", "preprocessor_config.json")
    has_processor = any((folder / name).exists() for name in processors)
    _CONTEXT.set_forkserver_preload(_PRELOAD + (_PRELOAD_FOR_IMAGES if has_processor else []))
    ensure_running()


@dataclass(eq=False)
class _Waiting:
    key: str
    owner: str
    task: TextTask
    num_tries: int = 0


@dataclass(eq=False)
class _Process:
    process: BaseProcess
    connection: Connection
    at: _Waiting | None = None


class TextPool:
    """Tasks in, answers out, by key. For one thread; no call waits unless told to."""

    def __init__(self, text: Text) -> None:
        """``text`` is copied into each process."""
        self._text = text
        self._processes: list[_Process] = []
        self._waiting: deque[_Waiting] = deque()
        self._answers: dict[str, Answer] = {}
        self._start()  # so that the first request finds a warm one

    @property
    def num_pending(self) -> int:
        """Tasks without an answer."""
        return len(self._waiting) + sum(p.at is not None for p in self._processes)

    def submit(self, key: str, owner: str, task: TextTask) -> None:
        """Begin a task as soon as its owner has a free process."""
        self._waiting.append(_Waiting(key, owner, task))
        self._begin_waiting()

    def answers(self, *, wait_seconds: float = 0.0) -> dict[str, Answer]:
        """The answers since the last call, waiting up to ``wait_seconds`` for some."""
        busy = {p.connection: p for p in self._processes if p.at is not None}
        for ready in connection.wait(list(busy), wait_seconds) if busy else []:
            self._receive(busy[ready])  # type: ignore[index]
        self._begin_waiting()
        answers, self._answers = self._answers, {}
        return answers

    def forget(self, key: str) -> None:
        """Drop a task, even a running one."""
        self._waiting = deque(w for w in self._waiting if w.key != key)
        for process in list(self._processes):
            if process.at is not None and process.at.key == key:
                self._end(process)
        self._begin_waiting()

    def close(self) -> None:
        """End all processes."""
        for process in list(self._processes):
            self._end(process)

    def _begin_waiting(self) -> None:
        owners = {p.at.owner for p in self._processes if p.at is not None}
        for waiting in list(self._waiting):
            if waiting.owner in owners:
                continue
            process = next((p for p in self._processes if p.at is None), None)
            if process is None:
                if len(self._processes) >= MOST_PROCESSES:
                    return
                process = self._start()
            self._waiting.remove(waiting)
            process.at = waiting
            owners.add(waiting.owner)
            try:
                process.connection.send(waiting.task)
            except OSError:  # it ended while idle
                self._ended(process)
        idle = [p for p in self._processes if p.at is None]
        for process in idle[IDLE_PROCESSES:]:
            self._end(process)

    def _start(self) -> _Process:
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=serve, args=(theirs, self._text), daemon=True)
        process.start()
        theirs.close()
        started = _Process(process, ours)
        self._processes.append(started)
        return started

    def _receive(self, process: _Process) -> None:
        if process.at is None:
            return
        try:
            answer: Answer = process.connection.recv()
        except (EOFError, OSError):
            self._ended(process)
            return
        self._answers[process.at.key] = answer
        process.at = None

    def _ended(self, process: _Process) -> None:
        """Its request fails if it took too long; else the cause may have been outside, so
        it gets a second try."""
        waiting = process.at
        process.process.join(1.0)
        code = process.process.exitcode
        self._end(process)
        if waiting is None:
            return
        waiting.num_tries += 1
        if code == -signal.SIGALRM:
            self._answers[waiting.key] = LimitExceeded(
                "A conversation or prompt took more than "
                f"{waiting.task.seconds:g} seconds to become tokens: send less text at a time, "
                "or tokens"
            )
        elif waiting.num_tries < 2:
            self._waiting.appendleft(waiting)
        else:
            self._answers[waiting.key] = TrainingError(
                "The process that turned this request's text into tokens ended, twice "
                f"(exit code {code}): send less text at a time, or tokens"
            )

    def _end(self, process: _Process) -> None:
        self._processes.remove(process)
        process.connection.close()
        if process.process.is_alive():
            process.process.kill()
        process.process.join()
        process.process.close()
