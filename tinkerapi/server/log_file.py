"""Limits the size of log files that processes write to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

MAX_LOG_BYTES = 10 * 1024 * 1024


def log_rotate(log: Path) -> bool:
    """Move a full log to ``NAME.log.1`` and empty it; True if it was full.

    Its writer keeps the file open in append mode, so it is copied and truncated, not renamed. A
    line that is written in between is lost. There are never more than two files of a name.
    """
    try:
        if log.stat().st_size <= MAX_LOG_BYTES:
            return False
        shutil.copyfile(log, log.with_suffix(".log.1"))
        os.truncate(log, 0)
    except FileNotFoundError:
        return False
    except OSError:  # a full disk has no room for the copy; new lines matter more
        os.truncate(log, 0)
    return True
