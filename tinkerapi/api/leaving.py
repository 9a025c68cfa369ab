"""What is to be done when a client closes its connection before it has its answer.

A view says so with ``when_client_leaves``; the handler (``tinkerapi.handlers``) is the one who
notices, and calls ``client_left``. A server that stops, or a network in which the client cannot
be seen to leave, is no client that leaves. The view may still be at work in a thread at that
moment, so both sides look at what the other has said.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from django.db import DatabaseError, InterfaceError
from django.http import HttpRequest

logger = logging.getLogger(__name__)

_ACT = "_when_client_leaves"
_LEFT = "_client_left"


def when_client_leaves(request: HttpRequest, act: Callable[[], None]) -> None:
    """Have ``act`` called once if the client leaves, in a database thread; at once if it has left.

    Call it from a database thread.
    """
    vars(request)[_ACT] = act
    if _LEFT in vars(request):
        _act(request)


async def client_left(request: HttpRequest) -> None:
    """Do what the request's view wanted to be done now, if it did."""
    vars(request)[_LEFT] = True
    if _ACT not in vars(request):
        return
    # Not before Django is set up, which is after the handler has been imported.
    from tinkerapi.api.threads import in_database_thread

    try:
        await in_database_thread(_act, request)
    except (DatabaseError, InterfaceError) as error:
        logger.warning("a client left, and what it asked for goes on: %s", str(error).strip())


def _act(request: HttpRequest) -> None:
    act = vars(request).pop(_ACT, None)  # one of both sides gets it
    if act is not None:
        act()
