"""What a future can ask of a run, and how each kind may be ordered.

Inside a lane, futures run in the order of their seq ids. Neighbours that only read the
weights may share one pass over the base model; a barrier runs after all before it and
before all after it.
"""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """``Future.kind``."""

    CREATE_RUN = "create_run"
    REMOVE_RUN = "remove_run"
    FORWARD = "forward"
    FORWARD_BACKWARD = "forward_backward"
    OPTIM_STEP = "optim_step"
    SAMPLE = "sample"
    SAVE_WEIGHTS = "save_weights"
    LOAD_WEIGHTS = "load_weights"
    CREATE_CUSTOM_LOSS = "create_custom_loss"
    """Done by writing it down; no worker sees it."""
    COMPARE_RUNS = "compare_runs"
    """Says whether two runs' states are equal; ``replayrun`` asks it."""


SHARED = frozenset({Kind.FORWARD, Kind.FORWARD_BACKWARD, Kind.SAMPLE})
"""May run beside their neighbours in the lane; every other kind is a barrier."""

LOGGED = frozenset({Kind.CREATE_RUN, Kind.FORWARD_BACKWARD, Kind.OPTIM_STEP, Kind.LOAD_WEIGHTS})
"""Change a run's state, so replaying them in order rebuilds it."""
