"""The function that django-q2 calls; its task only wakes the worker and carries no data."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

logger = logging.getLogger(__name__)

_serving: dict[str, Callable[[], None]] = {}


def serve(queue: str, run_until_idle: Callable[[], None]) -> None:
    """Register the function that a doorbell of this queue runs in this process.
    (``engineworker``)"""
    _serving[queue] = run_until_idle


def work(queue: str) -> None:
    """Work until no future of the queue may run.

    An exception means that the engine's memory may be ahead of the database or damaged. The
    process ends at once, without cleaning up; the supervisor starts another, which rebuilds
    from snapshots and logs, and uncommitted futures run again.
    """
    try:
        _serving[queue]()
    except BaseException:
        logger.exception("%s: leaving; a new worker takes over from the last commit", queue)
        logging.shutdown()
        os._exit(1)
