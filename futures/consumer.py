"""One process that serves one queue with django-q's own parts, but without its forks.

django-q's cluster is five processes around a fork: a worker that is killed while idle hangs it
forever, prefetched tasks return late, a killed parent leaves orphans, and a device context
does not survive the fork. Here django-q's ``worker`` runs in the calling thread, fed directly
from the broker, and its ``monitor`` in a second thread acknowledges finished tasks. Tasks,
signing, signals, results and admin remain django-q's.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType
from typing import Any

from django.db import DatabaseError, InterfaceError, connections
from django_q.conf import Conf
from django_q.monitor import monitor
from django_q.signing import BadSignature, SignedPackage
from django_q.worker import worker

from futures.broker import PostgresBroker, doorbell
from futures.database import alias

logger = logging.getLogger(__name__)

_SLICE_SECONDS = 0.2  # longest single wait for a notification, so that a stop is noticed
_BACKOFF_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)
_STOP = "STOP"  # ends django-q's loops


class Consumer:
    """Runs the tasks of one queue, one at a time, in order of arrival."""

    def __init__(self, queue: str) -> None:
        self.stopping = threading.Event()
        """Set it, or send SIGTERM or SIGINT, to end after the current task. A long task
        may look at it and return early."""
        self._queue = queue
        self._broker = PostgresBroker(list_key=queue)
        self._failures = 0
        self.on_turn: Callable[[], object] = lambda: None
        """Called several times a second while there is nothing to do; it may use the database. If
        it returns True and the queue is shared, this consumer looks at the futures."""
        self.shares_queue = False
        """Whether another consumer may take the queue's doorbells. If so, this one looks at the
        futures also when it is notified without finding a doorbell, and at each poll."""

    def run(self) -> None:
        """Serve until stopped; returns with every finished task acknowledged.

        A task's exception fails that task only. An exception that is not an ``Exception``, such
        as SystemExit, ends this method too. While Postgres is down, this waits.
        """
        results: SimpleQueue[Any] = SimpleQueue()
        acknowledging = threading.Thread(
            target=self._acknowledge, args=(results,), name=f"{self._queue} monitor"
        )
        acknowledging.start()
        try:
            with self._signals():
                worker(self, results, _Timer(), timeout=-1)
        finally:
            results.put(_STOP)
            acknowledging.join()

    def get(self) -> dict[str, Any] | str:
        """The next task, or STOP; django-q's worker calls it as its queue."""
        while not self.stopping.is_set():
            try:
                self.on_turn()
                task = self._next()
            except (DatabaseError, InterfaceError):
                self._back_off()
            else:
                self._failures = 0
                if task is not None:
                    return task
        return _STOP

    def _next(self) -> dict[str, Any] | None:
        """Claim a task, waiting for one up to ``poll`` seconds."""
        tasks = self._broker.claim()
        deadline = time.monotonic() + Conf.POLL
        while not tasks and not self.stopping.is_set() and time.monotonic() < deadline:
            if self.on_turn() is True and self.shares_queue:
                break
            if self._broker.wait(_SLICE_SECONDS):
                tasks = self._broker.claim()
                if self.shares_queue:
                    break
        if not tasks and self.shares_queue and not self.stopping.is_set():
            return {**SignedPackage.loads(doorbell(self._queue)), "cluster": self._queue}
        for task_id, package in tasks:
            try:
                task: dict[str, Any] = SignedPackage.loads(package)
            except (TypeError, BadSignature):
                logger.exception("A task of %s is not signed by this server", self._queue)
                self._broker.delete(task_id)
                continue
            return {**task, "cluster": self._queue, "ack_id": task_id}
        return None

    def _back_off(self) -> None:
        """Drop the connection and wait, longer each time; only the first failure is logged."""
        if self._failures == 0:
            logger.warning("Postgres does not answer; trying again", exc_info=True)
        connections[alias()].close()
        self.stopping.wait(_BACKOFF_SECONDS[min(self._failures, len(_BACKOFF_SECONDS) - 1)])
        self._failures += 1

    def _acknowledge(self, results: SimpleQueue[Any]) -> None:
        """Acknowledge and record finished tasks, in a thread and on a connection of its own."""
        try:
            while True:
                try:
                    monitor(results, PostgresBroker(list_key=self._queue))
                    return
                except (DatabaseError, InterfaceError):
                    # The task is delivered again after `retry`; a second doorbell does no harm.
                    logger.warning(
                        "An acknowledgement was lost because Postgres is down", exc_info=True
                    )
                    connections[alias()].close()
        finally:
            connections[alias()].close()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT set ``stopping``, if this thread may receive them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            signal.signal(number, self._stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping.set()


class _Timer:
    """Replaces the shared number by which django-q's guard would watch a forked worker."""

    def __init__(self) -> None:
        self.value: float = -1
        self._lock = threading.Lock()

    def get_lock(self) -> threading.Lock:
        return self._lock
