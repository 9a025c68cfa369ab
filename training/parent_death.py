"""Ends a child process after its parent was killed."""

from __future__ import annotations

import shutil
import sys


def parent_death_prefix(signal_name: str) -> list[str]:
    """The command prefix that sends a process this signal when its parent is killed.

    The signal follows the thread that starts the command, so start it from the main one.
    Empty if setpriv or the mechanism is missing (macOS): there, a killed parent leaves
    its children running.
    """
    setpriv = shutil.which("setpriv") if sys.platform == "linux" else None
    return [setpriv, f"--pdeathsig={signal_name}"] if setpriv else []
