"""Runs a command of somebody else's and ends it when this process is told to, whatever it does.

    python guard.py SECONDS COMMAND...

A program may lose the signal that tells it of its parent's death: vLLM does while it starts. It
would then keep its memory and its GPU for ever. So a supervisor starts this process instead, as the
leader of a process group. It passes the signal on, and kills the group if the command has not ended
after SECONDS. It imports nothing of this project, so it starts in a moment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial

_STOP = {signal.SIGTERM, signal.SIGINT}
_AWAITED = {*_STOP, signal.SIGCHLD}


def guard_prefix(seconds: float) -> list[str]:
    """The command prefix that guards a command: it ends at most so long after it was told to.

    Empty on macOS, where signals cannot be awaited in this way.
    """
    if sys.platform != "linux":
        return []
    return [sys.executable, "-I", "-S", __file__, str(seconds)]


def main(arguments: Sequence[str]) -> None:
    """Run the command to its end, and end in the same way."""
    seconds, *command = arguments
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    unblock = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, _AWAITED)
    process = subprocess.Popen(command, preexec_fn=unblock)  # noqa: S603 - one thread
    deadline: float | None = None
    while process.poll() is None:
        left = 3600.0 if deadline is None else max(0.0, deadline - time.monotonic())
        received = signal.sigtimedwait(_AWAITED, left)
        if received is None and deadline is not None:
            break
        if received is not None and received.si_signo in _STOP:
            process.terminate()
            deadline = deadline or time.monotonic() + float(seconds)
    if process.returncode is None or os.getppid() != parent:
        os.killpg(0, signal.SIGKILL)  # nobody else would end what the command has left
    _end_like(process.returncode)


def _end_like(status: int) -> None:
    if status < 0:
        with contextlib.suppress(OSError):  # KILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-status})
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
