"""What django-q2 calls: one function, whose task is a doorbell and carries no work."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

logger = logging.getLogger(__name__)

_serving: dict[str, Callable[[], None]] = {}


def serve(queue: str, run_until_idle: Callable[[], None]) -> None:
    """Say what the bell of this queue sets going in this process. (``engineworker``)"""
    _serving[queue] = run_until_idle


def work(queue: str) -> None:
    """Work until nothing on the queue may run.

    An exception means that the engine's memory may be ahead of the database or damaged. The
    process ends at once, without tidying up; the supervisor starts another, which rebuilds
    from snapshots and logs, and what was not committed runs again.
    """
    try:
        _serving[queue]()
    except BaseException:
        logger.exception("%s: leaving; a new worker takes over from the last commit", queue)
        logging.shutdown()
        os._exit(1)
