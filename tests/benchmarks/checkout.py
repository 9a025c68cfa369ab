"""Checkouts of other commits, to be measured beside this one."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.server import ROOT


def clone(folder: Path, commit: str) -> Path:
    """A new clone of this repository at ``commit``."""
    command = ["git", "clone", "--quiet", str(ROOT), str(folder)]
    subprocess.run(command, check=True)
    checkout = ["git", "-C", str(folder), "checkout", "--quiet", "--detach", commit]
    subprocess.run(checkout, check=True)
    return folder
