"""Stored results on their way to a client: in a thread if there is much to render."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from futures.models import Future
from tinkerapi.api.threads import in_database_thread

T = TypeVar("T")

LARGE_RESULT_BYTES = 64 * 1024
"""Compressed; a larger result is rendered in a thread, so that other waits go on."""


async def rendered(future: Future, render: Callable[[Future], T]) -> T:
    """What ``render`` makes of a final future, without holding up the event loop for long."""
    if future.result is not None and len(future.result) > LARGE_RESULT_BYTES:
        return await in_database_thread(render, future)
    return render(future)
