"""Folders of processes: those of the living stay, those of the dead are removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from training.own_folders import PREFIX, OwnFolder, left_behind

PROGRAM = """
import sys, tempfile
from training.own_folders import process_folder

folder = process_folder()
(folder / "content").write_text("x")
print(folder, flush=True)
sys.stdin.read()
"""


def start(root: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process with a folder, which lives until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "TMPDIR": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def end(process: subprocess.Popen[str], *, kill: bool = False) -> None:
    if kill:
        process.send_signal(signal.SIGKILL)
    process.communicate()


def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path: Path) -> None:
    killed, leftover = start(tmp_path)
    living, kept = start(tmp_path)
    end(killed, kill=True)
    foreign = tmp_path / f"{PREFIX}of-somebody-else"  # without a lock it is not ours
    foreign.mkdir()
    link = tmp_path / f"{PREFIX}link"
    link.symlink_to(kept)
    assert (leftover / "content").exists()
    third, own = start(tmp_path)
    assert not leftover.exists()
    assert (kept / "content").exists()
    assert foreign.exists()
    assert link.is_symlink()
    assert own.stat().st_mode & 0o777 == 0o700
    end(third)
    end(living)
    assert not own.exists()
    assert not kept.exists()


@pytest.mark.parametrize("first", ["multiprocessing.util", "training.own_folders"])
def test_multiprocessing_finds_its_own_folder_at_the_end(tmp_path: Path, first: str) -> None:
    program = f"""
import {first}, tempfile
from training.own_folders import process_folder

tempfile.tempdir = str(process_folder())
from multiprocessing.util import get_temp_dir

print(get_temp_dir())
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stderr == ""
    assert Path(ended.stdout.strip()).is_relative_to(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_hidden_until_it_is_locked(tmp_path: Path) -> None:
    """A process that was killed in between leaves it hidden; one that is doing it now keeps it."""
    hidden = tmp_path / ".young"
    hidden.mkdir()
    (hidden / "lock").touch()
    assert left_behind(tmp_path) == []
    os.utime(hidden, (0, 0))
    assert left_behind(tmp_path) == [hidden]


def test_an_unlocked_folder_is_a_leftover(tmp_path: Path) -> None:
    own = OwnFolder(tmp_path / "all", "one")
    assert left_behind(tmp_path / "all") == []
    own.unlock()
    assert left_behind(tmp_path / "all") == [own.path]
    own.remove()
    assert left_behind(tmp_path / "all") == []
