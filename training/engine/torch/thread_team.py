"""Threads that compute parts of one operation at the same time.

How torch divides a sum among its own threads shows in the last bits. So an operation of torch has
one thread here, and a large product is cut into parts that are operations of their own: rows of a
matrix, or matrices of a batch, whose bits do not depend on how many share a product
(``packing.stream``). How many threads compute the parts, and which of them computes which, then
shows in no bit, and may change between two operations.

Only an operation whose bits are known not to depend on torch's threads gets those instead
(``in_one``): they begin within microseconds, where a thread of ours has to wake first.

A thread that waits sleeps. Parts are taken one after another, so a thread that another process
delays leaves more of them to the others.

A task may also be a whole pass, whose own operations the team computes in parts: with the threads
that are left if they are shared out among the passes.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

T = TypeVar("T")

PARTS_EACH = 2
"""Parts of an operation for each thread."""

PART_ROWS = 64
"""Fewest rows of a part: with fewer, handing it over takes a large part of its time."""

ROWS_MULTIPLE = 32
"""Parts begin at multiples of this many rows: kernels take rows, and numbers, in blocks."""

NICENESS = 5
"""More of the threads beside the calling one: processes that answer people have priority."""


class ThreadTeam:
    """Computes the tasks of one operation at a time."""

    def __init__(self, size: int = 1) -> None:
        """``size``: threads, the calling one included."""
        self._size = size
        self._share = _Share()
        self._calls: SimpleQueue[_Call] = SimpleQueue()
        self._num_helpers = 0

    @property
    def size(self) -> int:
        """The threads for an operation of the calling thread; may be changed between two."""
        return self._share.size or self._size

    @size.setter
    def size(self, size: int) -> None:
        self._size = size

    def run(self, tasks: Sequence[Callable[[], T]], *, at_once: int | None = None) -> list[T]:
        """The results of the tasks, in order; no task may depend on another.

        Gradients are not recorded, unless a task turns that on for itself.

        Args:
            at_once: Most tasks at the same time, among which the threads are shared out; None: a
                thread for each, and none for the operations of a task.

        Raises:
            BaseException: The first exception of a task, after all have ended.
        """
        size = self.size
        num_helpers = min(size, len(tasks), at_once or size) - 1
        with torch.no_grad():
            if num_helpers < 1:
                return [task() for task in tasks]
            share = 1 if at_once is None else size // (num_helpers + 1)
            call = _Call(tasks, self._share, share)
            if not self._share.size:
                self._start(size - 1)
            for _ in range(num_helpers):
                self._calls.put(call)
            call.take_part()
            return call.wait()

    def in_one(self, operation: Callable[[], T]) -> T:
        """The result of one operation, computed by so many of torch's own threads.

        Its bits must not depend on their number.
        """
        size = self.size
        if size == 1:
            return operation()
        before = torch.get_num_threads()
        torch.set_num_threads(size)  # takes less than a microsecond
        try:
            return operation()
        finally:
            torch.set_num_threads(before)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Compute everything in the calling thread, for what can only observe that one."""
        size, self._size = self._size, 1
        try:
            yield
        finally:
            self._size = size

    def parts(self, num_rows: int, fewest: int = PART_ROWS) -> list[slice]:
        """Rows 0 to n, cut for ``run``; one part if there are too few of them."""
        return cut(num_rows, max(1, min(self.most_parts, num_rows // fewest)), ROWS_MULTIPLE)

    @property
    def most_parts(self) -> int:
        """The number of parts of a large operation."""
        return PARTS_EACH * self.size if self.size > 1 else 1

    def _start(self, num_helpers: int) -> None:
        while self._num_helpers < num_helpers:
            self._num_helpers += 1
            name = f"engine {self._num_helpers}"
            threading.Thread(target=_help, args=(self._calls,), name=name, daemon=True).start()


def cut(num_rows: int, count: int, multiple: int = 1) -> list[slice]:
    """Rows 0 to n in parts of about equal size that begin at multiples of ``multiple``."""
    if count == 1:
        return [slice(0, num_rows)]
    starts = [i * num_rows // count // multiple * multiple for i in range(count)]
    ends = [*starts[1:], num_rows]
    return [slice(*bounds) for bounds in zip(starts, ends, strict=True)]


class _Share(threading.local):
    """What the current thread may use in a task."""

    size = 0
    """Threads; 0 outside of a task."""


class _Call:
    """The tasks of one operation, and who has done which."""

    def __init__(self, tasks: Sequence[Callable[[], Any]], share: _Share, size: int) -> None:
        """``size``: the threads for the operations of each task."""
        self._share = share
        self._size = size
        self._tasks = deque(enumerate(tasks))
        self._results: list[Any] = [None] * len(tasks)
        self._num_left = len(tasks)
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._is_done = threading.Lock()
        self._is_done.acquire()

    def take_part(self) -> None:
        """Do tasks until none is left."""
        before, self._share.size = self._share.size, self._size
        while True:
            try:
                number, task = self._tasks.popleft()
            except IndexError:
                break
            try:
                self._results[number] = task()
            except BaseException as error:  # raised again in the caller's thread
                self._error = self._error or error
            with self._lock:
                self._num_left -= 1
                if not self._num_left:
                    self._is_done.release()
        self._share.size = before

    def wait(self) -> list[Any]:
        """The results, once all tasks are done."""
        self._is_done.acquire()
        # A helper that comes late must not keep their memory.
        results, self._results = self._results, []
        if self._error is not None:
            raise self._error
        return results


def _help(calls: SimpleQueue[_Call]) -> None:
    if sys.platform == "linux":
        own = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, own) + NICENESS
        os.setpriority(os.PRIO_PROCESS, own, niceness)
    torch.set_num_threads(1)  # for this thread's operations
    with torch.no_grad():
        while True:
            calls.get().take_part()
