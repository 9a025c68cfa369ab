"""Limits how many large bodies of one user are received at a time.

A large body is in a temporary file from its first byte until a thread has decoded it, and a user
has one such thread at a time. Without a limit hundreds of bodies could fill the disk, which all
users share. A client that waits for its turn sends nothing: unread data stays at the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakValueDictionary

from django.http import HttpRequest

BODIES_AT_A_TIME = 4
"""One is decoded while others arrive."""

_TURN_ENDS = "tinkerapi.body_turn_ends"

_turns: WeakValueDictionary[tuple[int, object], asyncio.Semaphore] = WeakValueDictionary()
"""By event loop and owner; kept as long as a request has a turn or waits for one."""


async def body_turn(owner: object) -> asyncio.Semaphore:
    """Wait for one of the owner's turns; ``held_turn`` releases it."""
    key = (id(asyncio.get_running_loop()), owner)
    turns = _turns.get(key) or _turns.setdefault(key, asyncio.Semaphore(BODIES_AT_A_TIME))
    await turns.acquire()
    return turns


@contextmanager
def held_turn(scope: MutableMapping[str, Any], turns: asyncio.Semaphore) -> Iterator[None]:
    """Release the turn at the end, or as soon as the body is dropped."""
    with ExitStack() as turn:
        turn.callback(turns.release)
        scope[_TURN_ENDS] = turn.close
        yield


def let_go_of_body(request: HttpRequest) -> None:
    """Drop a body that will not be read again: the wait for an answer may be long."""
    vars(request).pop("_body", None)
    if stream := getattr(request, "_stream", None):
        stream.close()
    getattr(request, "scope", {}).get(_TURN_ENDS, lambda: None)()
