"""Renders stored results for clients, large ones in a thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from futures.models import Future
from tinkerapi.api.threads import in_database_thread

T = TypeVar("T")

LARGE_RESULT_BYTES = 64 * 1024
"""Compressed size; a larger result is rendered in a thread, so that other requests continue."""


async def rendered(future: Future, render: Callable[[Future], T]) -> T:
    """``render`` of a final future, without blocking the event loop for long."""
    if future.result is not None and len(future.result) > LARGE_RESULT_BYTES:
        return await in_database_thread(render, future)
    return render(future)
