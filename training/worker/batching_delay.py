"""Waiting a moment for what is about to arrive, so that it can share a pass.

A client that submits five batches one after another has sent the second when the first could
begin: without this the first would run alone, and merging would gain less. How long the next
one may take is known from the one before: a pause of several times the last one means that
there is no next one. And a client that begins to wait for a result has sent what it had.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from futures.notify import Bell

FIRST_SECONDS = 0.02
"""The longest pause, and the only one of which nothing is known."""

LEAST_SECONDS = 0.006
"""Less is what a busy machine adds to any pause."""

PAUSES = 4
LIMIT_SECONDS = 0.1  # in all, however many keep arriving


def collect_batch_mates(
    *,
    may_wait: Callable[[], bool],
    bell_rang: Callable[[float], Bell],
    claim: Callable[[], object],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Claim what arrives, until a pause says that it was all.

    What may wait itself is claimed at the end, all at once: a claim takes time, and the processors,
    from the client that is still sending.

    Args:
        may_wait: Whether nobody minds; asked again after each claim.
        bell_rang: What is heard within so many seconds.
    """
    begun = last = clock()
    pause = FIRST_SECONDS
    some_wait = False
    while may_wait() and clock() - begun < LIMIT_SECONDS:
        heard = bell_rang(pause)
        now = clock()
        pause = min(FIRST_SECONDS, max(LEAST_SECONDS, PAUSES * (now - last)))
        last = now
        if heard & Bell.RANG:
            claim()
            some_wait = False
        elif heard & Bell.DELAYABLE:
            some_wait = True
        if heard & Bell.FLUSH or not heard & Bell.SUBMITTED:
            break
    if some_wait:
        claim()
