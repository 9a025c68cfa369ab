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
    The worker commits its result or its error, fenced by that epoch. What has stopped too many
    workers is failed by the next one, when it takes over.
release
    The worker stopped or died before the commit; nothing of it is visible, so it waits again.
refuse
    The request can never run: its lane waited in vain for a number. One that is invalid but has
    consumed its number is failed from the start.
cancel
    Its owner no longer wants it, and it had not begun.
interrupt
    Its owner no longer wants it, and it is one that changes nothing: what was done of it is
    dropped. The row is final at once; the worker hears of it and lets go.
"""

from django.db.models import TextChoices


class State(TextChoices):
    """Where a future is in its life; the last three are final."""

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
    """Whose fault a failure is, as the client is told."""

    USER = "user"
    SERVER = "server"
    UNKNOWN = "unknown"
