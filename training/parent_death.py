"""How a process that we start goes when we are killed and can end nothing ourselves."""

from __future__ import annotations

import shutil
import sys


def parent_death_prefix(signal_name: str) -> list[str]:
    """What to put before a command so that it gets this signal when its parent is killed.

    The signal follows the thread that starts the command, so start it from the main one.
    Nothing where setpriv or the mechanism is missing (macOS): there, a killed parent leaves
    its children running.
    """
    setpriv = shutil.which("setpriv") if sys.platform == "linux" else None
    return [setpriv, f"--pdeathsig={signal_name}"] if setpriv else []
