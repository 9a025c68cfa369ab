"""Log files that processes print into, kept from growing while they print."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

MAX_LOG_BYTES = 10 * 1024 * 1024


def log_rotate(log: Path) -> bool:
    """Move what a full log holds to ``NAME.log.1`` and empty it; whether that was so.

    Its writer keeps the file open, in append mode: it is copied and cut, not renamed. A line that
    is written in between is lost. Two files of a name are the most there are.
    """
    try:
        if log.stat().st_size <= MAX_LOG_BYTES:
            return False
        shutil.copyfile(log, log.with_suffix(".log.1"))
        os.truncate(log, 0)
    except FileNotFoundError:
        return False
    except OSError:  # a full disk has no room for the copy; what is new matters more
        os.truncate(log, 0)
    return True
