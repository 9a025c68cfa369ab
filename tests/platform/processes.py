"""Looking at processes."""

from __future__ import annotations

from pathlib import Path


def is_running(pid: int) -> bool:
    """Also False for a process that has ended and was not waited for yet."""
    return state(pid) not in (None, "Z")


def state(pid: int) -> str | None:
    """The kernel's letter for its state; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None
