"""Processes that turn requests' text into tokens, so that nobody waits for another user's text.

Short text does not come here (``training.worker.short_texts``).

An owner has one process at a time, which gets several of the owner's requests at once if they are
small: while samples run, the worker looks at the answers only every now and then. A process that
ends fails only the request that it was working on.
"""

from __future__ import annotations

import signal
import tempfile
import threading
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue

from training.errors import LimitExceeded, TrainingError
from training.own_folders import process_folder
from training.worker.text_process import Answer, TextTask, serve
from training.worker.text_work import Text

MOST_PROCESSES = 8
IDLE_PROCESSES = 2
"""Idle processes kept for the next request; further ones end when idle."""

TASKS_TOGETHER = 64
"""Most tasks that a process gets at once."""
BYTES_TOGETHER = 32 * 1024
"""Most bytes of several tasks together. A connection takes them at once, so sending does not wait
for the process."""

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


def _run_server(folder: Path) -> None:
    """Start the process that imports the modules; ``folder`` is the model's."""
    from multiprocessing.forkserver import ensure_running

    processors = ("processor_config.json", "preprocessor_config.json")
    has_processor = any((folder / name).exists() for name in processors)
    _CONTEXT.set_forkserver_preload(_PRELOAD + (_PRELOAD_FOR_IMAGES if has_processor else []))
    before, tempfile.tempdir = tempfile.tempdir, str(process_folder())
    try:
        ensure_running()  # its socket's folder would stay after a kill of this process
    finally:
        tempfile.tempdir = before


@dataclass(eq=False)
class _Waiting:
    key: str
    owner: str
    task: TextTask
    num_tries: int = 0
    is_forgotten: bool = False


@dataclass(eq=False)
class _Process:
    process: BaseProcess
    connection: Connection
    tasks: deque[_Waiting] = field(default_factory=deque)
    """Tasks of one owner; it works on the first, and answers in this order."""


class TextPool:
    """Tasks in, answers out, by key. For one thread; no call waits unless told to."""

    def __init__(self, text: Text) -> None:
        """``text`` is copied into each process."""
        self._text = text
        self._processes: list[_Process] = []
        self._waiting: deque[_Waiting] = deque()
        self._answers: dict[str, Answer] = {}
        self._warming: threading.Thread | None = None
        self._warm: SimpleQueue[_Process] = SimpleQueue()

    def warm_up(self, folder: Path) -> None:
        """Start the first process beside the caller's work; tasks wait until it has started.

        It takes a second of processor time, so a worker calls this once it serves.

        Args:
            folder: The model's.
        """

        def start() -> None:
            _run_server(folder)
            self._warm.put(self._new_process())

        self._warming = threading.Thread(target=start, name="text", daemon=True)
        self._warming.start()

    @property
    def num_pending(self) -> int:
        """Tasks without an answer."""
        begun = [task for process in self._processes for task in process.tasks]
        return len(self._waiting) + sum(not task.is_forgotten for task in begun)

    def submit(self, key: str, owner: str, task: TextTask) -> None:
        """Begin a task as soon as its owner has a free process."""
        self._waiting.append(_Waiting(key, owner, task))
        self._begin_waiting()

    def answers(self, *, wait_seconds: float = 0.0) -> dict[str, Answer]:
        """The answers since the last call, waiting up to ``wait_seconds`` for some."""
        if self._warming is not None:
            self._warming.join(wait_seconds if self._waiting else 0.0)
            self._begin_waiting()
            wait_seconds = 0.0
        busy = {p.connection: p for p in self._processes if p.tasks}
        for ready in connection.wait(list(busy), wait_seconds) if busy else []:
            self._receive(busy[ready])  # type: ignore[index]
        self._begin_waiting()
        answers, self._answers = self._answers, {}
        return answers

    def forget(self, key: str) -> None:
        """Drop a task, even a running one."""
        self._waiting = deque(w for w in self._waiting if w.key != key)
        for process in list(self._processes):
            for number, task in enumerate(process.tasks):
                task.is_forgotten |= task.key == key
                if task.key == key and number == 0:
                    self._take_back(process)
                    self._end(process)
                    break
        self._begin_waiting()

    def close(self) -> None:
        """End all processes."""
        if self._warming is not None:
            self._warming.join()
            self._is_warming()
        for process in list(self._processes):
            self._end(process)

    def _is_warming(self) -> bool:
        """Whether the first process has not started yet; takes it if it has."""
        if self._warming is None:
            return False
        if self._warming.is_alive():
            return True
        self._warming = None
        if not self._warm.empty():  # else it could not be started, and the next one says why
            self._processes.append(self._warm.get())
        return False

    def _begin_waiting(self) -> None:
        if self._is_warming():
            return
        owners = {p.tasks[0].owner for p in self._processes if p.tasks}
        while batch := self._next_batch(but=owners):
            process = next((p for p in self._processes if not p.tasks), None)
            if process is None:
                if len(self._processes) >= MOST_PROCESSES:
                    break
                process = self._start()
            chosen = set(map(id, batch))
            self._waiting = deque(w for w in self._waiting if id(w) not in chosen)
            process.tasks.extend(batch)
            owners.add(batch[0].owner)
            try:
                for waiting in batch:
                    process.connection.send(waiting.task)
            except OSError:  # it ended while idle
                self._ended(process)
        idle = [p for p in self._processes if not p.tasks]
        for process in idle[IDLE_PROCESSES:]:
            self._end(process)

    def _next_batch(self, *, but: Collection[str]) -> list[_Waiting]:
        """The oldest waiting task of an owner who is not among these, and those of the same owner
        that may go with it."""
        batch: list[_Waiting] = []
        size = 0
        for waiting in self._waiting:
            if waiting.owner in but or (batch and waiting.owner != batch[0].owner):
                continue
            size += len(waiting.task.payload)
            if batch and size > BYTES_TOGETHER:
                break  # in order: a large one is not overtaken
            batch.append(waiting)
            if len(batch) == TASKS_TOGETHER:
                break
        return batch

    def _start(self) -> _Process:
        started = self._new_process()
        self._processes.append(started)
        return started

    def _new_process(self) -> _Process:
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=serve, args=(theirs, self._text), daemon=True)
        process.start()
        theirs.close()
        return _Process(process, ours)

    def _receive(self, process: _Process) -> None:
        """Take the answers that have come."""
        try:
            while process.tasks and process.connection.poll():
                answer: Answer = process.connection.recv()
                waiting = process.tasks.popleft()
                if not waiting.is_forgotten:
                    self._answers[waiting.key] = answer
        except (EOFError, OSError):
            self._ended(process)

    def _take_back(self, process: _Process) -> None:
        """Let a process's tasks wait again, before all others."""
        self._waiting.extendleft(w for w in reversed(process.tasks) if not w.is_forgotten)
        process.tasks.clear()

    def _ended(self, process: _Process) -> None:
        """The request that it worked on fails if it took too long; else the cause may have been
        outside, so it gets a second try. The others wait again."""
        waiting = process.tasks.popleft() if process.tasks else None
        process.process.join(1.0)
        code = process.process.exitcode
        self._take_back(process)
        self._end(process)
        if waiting is None or waiting.is_forgotten:
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
