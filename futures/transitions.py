"""The states of a future and every legal move between them.

::

                    claim               finish
      pending ───────────────> running ────────> ready
         │  ^                   │ │ │
         │  └───── release ─────┘ │ └─ fail ───> failed
         │                        │                ^
         ├──────── refuse ────────┼────────────────┘
         │                        │ interrupt
         └──────── cancel ────────┴────────────> cancelled

claim
    A worker takes the future under its epoch.
finish, fail
    The worker commits its result or its error, fenced by that epoch. A future that has stopped too
    many workers is failed by the next one, when it takes over.
release
    The worker stopped or died before the commit; nothing is visible, so the future waits again.
refuse
    The request can never run: its lane waited in vain for a number. A request that is invalid but
    has used its number is failed from the start.
cancel
    The owner cancels it before it has begun.
interrupt
    The owner cancels it while it runs; only futures that change nothing can be. The partial work
    is dropped. The row is final at once; the worker is told and drops it.
"""

from django.db.models import TextChoices


class State(TextChoices):
    """The state of a future; the last three are final."""

    PENDING = "pending"
    RUNNING = "running"
    READY = "ready"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL_STATES = (State.READY, State.FAILED, State.CANCELLED)

MOVES: dict[str, tuple[State, State]] = {
    "claim": (State.PENDING, State.RUNNING),
    "finish": (State.RUNNING, State.READY),
    "fail": (State.RUNNING, State.FAILED),
    "release": (State.RUNNING, State.PENDING),
    "refuse": (State.PENDING, State.FAILED),
    "cancel": (State.PENDING, State.CANCELLED),
    "interrupt": (State.RUNNING, State.CANCELLED),
}
"""Verb to (from, to)."""


class Category(TextChoices):
    """Who caused a failure, as the client is told."""

    USER = "user"
    SERVER = "server"
    UNKNOWN = "unknown"
