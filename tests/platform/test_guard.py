"""What a guarded command and its children do when the guard or its parent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.platform.processes import is_running
from tests.waiting import wait_for
from tinkerapi.server.guard import guard_prefix
from training.parent_death import parent_death_prefix

CHILD = """
import os, signal, subprocess, sys, time
if {deaf}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({file!r} + ".new", "w").write(f"{{os.getpid()}} {{below.pid}}")
os.rename({file!r} + ".new", {file!r})
time.sleep(600)
"""


class Guarded:
    """A guard below a parent, its command, and a child of that."""

    def __init__(self, folder: Path, *, deaf: bool, seconds: float) -> None:
        file = folder / "pids"
        script = CHILD.format(deaf=deaf, file=str(file))
        guarded = [*guard_prefix(seconds), sys.executable, "-c", script]
        command = [*parent_death_prefix("TERM"), *guarded]
        start = f"import subprocess; subprocess.Popen({command!r}, process_group=0).wait()"
        self.parent = subprocess.Popen([sys.executable, "-c", start])
        wait_for(file.exists)
        self.below = [int(pid) for pid in file.read_text().split()]
        self.guard = int(Path(f"/proc/{self.below[0]}/stat").read_text().split(") ")[1].split()[1])

    def all_over(self) -> bool:
        return not any(map(is_running, (self.guard, *self.below)))


@pytest.fixture
def ended(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Guarded]:
    guarded = Guarded(tmp_path, **request.param)
    yield guarded
    guarded.parent.kill()
    guarded.parent.wait()
    for pid in (guarded.guard, *guarded.below):
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


HEARING, DEAF = {"deaf": False, "seconds": 60.0}, {"deaf": True, "seconds": 0.1}


@pytest.mark.skipif(not parent_death_prefix("TERM"), reason="needs setpriv")
@pytest.mark.parametrize("ended", [HEARING, DEAF], indirect=True, ids=["hearing", "deaf"])
def test_nothing_outlives_a_killed_parent(ended: Guarded) -> None:
    ended.parent.kill()
    wait_for(ended.all_over)


@pytest.mark.parametrize("ended", [DEAF], indirect=True, ids=["deaf"])
def test_a_command_that_ignores_the_signal_is_killed_with_its_children(ended: Guarded) -> None:
    os.kill(ended.guard, signal.SIGTERM)
    wait_for(ended.all_over)


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("raise SystemExit(3)", 3),
        ("pass", 0),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    ],
)
def test_a_guard_ends_like_its_command(script: str, status: int) -> None:
    command = [*guard_prefix(1.0), sys.executable, "-c", script]
    assert subprocess.run(command, process_group=0, check=False).returncode == status


def test_the_command_gets_the_signal_first(tmp_path: Path) -> None:
    script = (
        "import signal, sys, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\n"
        "signal.pause()\n"
    )
    command = [*guard_prefix(60.0), sys.executable, "-c", script]
    process = subprocess.Popen(command, process_group=0)
    wait_for((tmp_path / "up").exists)
    process.terminate()
    assert process.wait(60) == 7
