"""A process beside the worker that turns text into tokens, and nothing else.

A template is a program and a tokenizer's time depends on the text, so both run where they can be
ended: the kernel ends a process whose item takes too long, whatever it is doing. While one
renders, it does not hold the Python lock of the engine's thread.
"""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection

from training.errors import LimitExceeded, TrainingError
from training.kinds import ForwardBackward, Sample, stored_request
from training.worker.text_work import Item, Text, tokens_of

MEMORY_BYTES = 4 * 1024**3
"""Memory limit beyond the process's initial memory."""

NICENESS = 5
"""The engine has priority."""


@dataclass(frozen=True)
class TextTask:
    """One request's text."""

    kind: str
    payload: bytes
    """Kind and payload, as the future stores them."""
    max_context_tokens: int
    seconds: float
    """Time limit of one conversation or prompt."""


Answer = list[Item] | TrainingError


def serve(connection: Connection, text: Text) -> None:
    """Answer tasks until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker handles Ctrl+C
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
    os.nice(NICENESS)
    _limit_memory()
    while True:
        try:
            task: TextTask = connection.recv()
            connection.send(_answer(text, task))
        except (EOFError, OSError):
            return


def _answer(text: Text, task: TextTask) -> Answer:
    def begin_item() -> None:
        signal.setitimer(signal.ITIMER_REAL, task.seconds)

    try:
        request = stored_request(task.kind, task.payload)
        if not isinstance(request, ForwardBackward | Sample):
            raise TypeError(f"{task.kind} has no text")
        return tokens_of(
            text,
            request,
            max_context_tokens=task.max_context_tokens,
            on_item=begin_item,
        )
    except TrainingError as error:
        return error
    except MemoryError:
        return LimitExceeded(
            "This request's text needs more memory for tokenizing than is allowed: send "
            "less text at a time, or tokens"
        )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory() -> None:
    try:
        with open("/proc/self/statm") as statm:
            now = int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        return
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))
