"""Starts the other ranks of a worker as its children, and ends it when one of them ends.

torchrun would do that too, but between the supervisor and the worker it is in the way: it closes
the worker's watchdog pipe, puts each rank into a session of its own, out of reach of the
supervisor's kill, and kills a stopping worker before its snapshots are written. So the worker,
which the supervisor watches already, is the first rank, and starts the others in its own process
group. They meet through a file in a private folder; all are on one machine.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

from training.base_model_config import BaseModelConfig
from training.own_folders import process_folder
from training.parent_death import parent_death_prefix

logger = logging.getLogger(__name__)

FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals by which a person or the machine ends a rank; others follow from its work."""

LAST_WORDS_SECONDS = 5.0
"""For the working thread to report its own error after another rank has ended."""

NOTICE_SECONDS = 1.0
"""In which the end of a rank is known here after an exchange with it has failed."""

_numbers = count(1)


@dataclass(frozen=True, kw_only=True)
class RankStart:
    """What a rank needs to build its engine."""

    config: BaseModelConfig
    folder: str
    rank: int
    device: str
    """``cpu`` or ``cuda:N``."""
    meeting_place: str
    num_threads: int
    num_sharing: int
    batch_tokens: int
    cache_tokens: int
    wait_seconds: float
    """Longest wait of the first rank for another one, while the model is loaded and in a pass."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> RankStart:
        values = json.loads(text)
        config = values.pop("config")
        config["devices"] = tuple(config["devices"])
        return cls(config=BaseModelConfig(**config), **values)


def meeting_place() -> Path:
    """A new file's path in this process's private folder."""
    return process_folder() / f"meeting_place-{next(_numbers)}"


class Members:
    """The other ranks' processes."""

    def __init__(
        self, first: RankStart, devices: Sequence[str], *, leave: Callable[[], None] | None = None
    ) -> None:
        """Start them; call it in the main thread.

        Args:
            first: This process's own start.
            devices: By rank.
            leave: Called when one of them has ended; None ends this process at once.
        """
        self._leave = leave or _leave
        self._is_over = False
        self._processes = {
            rank: _start(replace(first, rank=rank, device=device))
            for rank, device in enumerate(devices)
            if rank > 0
        }
        atexit.register(self.stop)
        for rank, process in self._processes.items():
            threading.Thread(
                target=self._end_with, args=(rank, process), name=f"rank {rank}", daemon=True
            ).start()

    @property
    def pids(self) -> list[int]:
        """Process numbers of ranks 1, 2 and so on."""
        return [process.pid for process in self._processes.values()]

    def states(self) -> str:
        """What the system says of each rank's process, for a message."""
        return ", ".join(
            f"rank {rank} (process {process.pid}) {_state(process)}"
            for rank, process in self._processes.items()
        )

    def end_if_one_was_killed(self) -> None:
        """After an exchange has failed: end this process if another rank was ended from outside.

        It leaves no trace of a crash then, because no request caused it.
        """
        deadline = time.monotonic() + NOTICE_SECONDS
        while time.monotonic() < deadline:
            for process in self._processes.values():
                if _was_killed(process.poll()):
                    self._leave()
            time.sleep(0.01)

    def _end_with(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """End this process once a rank has ended, by a thread of its own: the working thread may
        wait for that rank without end."""
        status = process.wait()
        if self._is_over:
            return
        how = f"exit code {status}" if status >= 0 else signal.Signals(-status).name
        logger.error("rank %d has ended (%s), and this worker with it", rank, how)
        if not _was_killed(status):
            time.sleep(LAST_WORDS_SECONDS)
        self._leave()

    def stop(self) -> None:
        """End the other ranks; nothing is lost with them."""
        self._is_over = True
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()


def _state(process: subprocess.Popen[bytes]) -> str:
    if process.poll() is not None:
        return f"has ended with {process.returncode}"
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return "lives"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("State")), "")


def _was_killed(status: int | None) -> bool:
    return status is not None and -status in FROM_OUTSIDE


def _leave() -> None:
    logging.shutdown()
    os._exit(1)


def _start(start: RankStart) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if start.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen(  # noqa: S603
        [
            *parent_death_prefix("KILL"),
            sys.executable,
            "-m",
            "training.engine.group.follower",
            start.to_json(),
        ],
        env=environment,
        stdin=subprocess.DEVNULL,
    )
