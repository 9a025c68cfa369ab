"""How long a client may be silent before it counts as gone, for each use that is made of it.

The SDK's clients send a heartbeat every ten seconds. Each use has a limit of its own, by what it
costs to be wrong.
"""

from __future__ import annotations

from datetime import timedelta

SHOWN_AS_GONE = timedelta(minutes=1)
"""Pages say that the client has gone."""

FREES_QUOTA = timedelta(minutes=5)
"""The session's adapters no longer count towards their owner's limit."""

FREES_MEMORY = timedelta(minutes=10)
"""The session's adapters are the first that leave the worker's memory."""

ENDS_CHECKPOINTS = timedelta(hours=1)
"""The session has ended for its private checkpoints, which expire."""

ENDS_SESSION = timedelta(days=7)
"""The session is finished; a computer may sleep for days and continue."""
