"""How many of the processors a worker computes on."""

from __future__ import annotations

from django.conf import settings


def num_threads(torchs_own: int) -> int:
    """Threads of one worker's passes on a CPU.

    One processor is left to web and Postgres: torch's threads wait for each other in busy loops,
    and while one of them is kept waiting by another process, a pass takes ten times as long.

    Args:
        torchs_own: How many torch takes when nobody tells it otherwise.
    """
    return int(settings.NUM_THREADS) or max(1, torchs_own - 1)
