"""Actions for a client that closes its connection before its answer is complete.

A view registers one with ``when_client_leaves``; the handler (``tinkerapi.handlers``) notices the
disconnect and calls ``client_left``. A server that stops, and a network that hides the disconnect,
do not count. The view may still be at work in a thread at that
moment, so each side checks the other's state.
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
    """Call ``act`` once if the client leaves, in a database thread; at once if it has left.

    Call it from a database thread.
    """
    vars(request)[_ACT] = act
    if _LEFT in vars(request):
        _act(request)


async def client_left(request: HttpRequest) -> None:
    """Run the action that the request's view registered, if any."""
    vars(request)[_LEFT] = True
    if _ACT not in vars(request):
        return
    # Imported here, because Django is set up after the handler has been imported.
    from tinkerapi.api.threads import in_database_thread

    try:
        await in_database_thread(_act, request)
    except (DatabaseError, InterfaceError) as error:
        logger.warning("a client left, and its request continues: %s", str(error).strip())


def _act(request: HttpRequest) -> None:
    act = vars(request).pop(_ACT, None)  # only one side gets it
    if act is not None:
        act()
