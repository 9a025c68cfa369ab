"""The batching delay: waits a moment for requests that are about to arrive and can share a pass.

When a client submits five batches one after another, the second has arrived by the time the first
could
start: without the delay the first would run alone, and merging would gain less. The pause before
the next one is predicted from the previous pause: a pause several times as long means that there is
no next one. A client that begins to wait for a result has sent all of its requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from futures.notify import Bell

FIRST_SECONDS = 0.02
"""The longest pause, used when no previous pause is known."""

LEAST_SECONDS = 0.006
"""The shortest pause; a busy machine adds this much to any pause."""

PAUSES = 4
LIMIT_SECONDS = 0.1  # in all, even if more keep arriving


def collect_batch_mates(
    *,
    may_wait: Callable[[], bool],
    bell_rang: Callable[[float], Bell],
    claim: Callable[[], object],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Claim arriving requests until a pause shows that there are no more.

    Delayable requests are claimed at the end, all at once: a claim takes time, and CPU time
    from the client that is still sending.

    Args:
        may_wait: Whether the held requests may be delayed; called again after each claim.
        bell_rang: The notifications within a number of seconds.
    """
    begun = last = clock()
    pause = FIRST_SECONDS
    some_wait = False
    while may_wait() and clock() - begun < LIMIT_SECONDS:
        heard = bell_rang(pause)
        now = clock()
        pause = min(FIRST_SECONDS, max(LEAST_SECONDS, PAUSES * (now - last)))
        last = now
        if heard & Bell.UNDELAYED:
            claim()
            some_wait = False
        elif heard & Bell.DELAYED:
            some_wait = True
        if heard & Bell.FLUSH or not heard & Bell.SUBMITTED:
            break
    if some_wait:
        claim()
