"""Waiting for what other threads and processes do, without sleeping longer than needed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LONG_SECONDS = 120.0
"""A time limit that only a broken test reaches, even on a slow or busy machine."""


def wait_for(look: Callable[[], T | None], seconds: float = LONG_SECONDS) -> T:
    """The result of ``look`` once it is neither None nor empty; fails when the time is up."""
    deadline = time.monotonic() + seconds
    while not (value := look()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
    return value
