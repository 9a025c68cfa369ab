"""A worker's end is blamed on its futures only if the crash log says so, or is missing."""

from __future__ import annotations

import faulthandler
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.db import OperationalError
from pytest_django import Settings

from futures.models import Worker
from training.worker import crash_log
from training.worker.crash_log import (
    CrashLog,
    crash_file,
    crashed,
    oom_kills,
    remove_judged,
)

DIES = """
import django
django.setup()
import faulthandler
from futures.models import Worker
from training.worker.crash_log import CrashLog
crash_log = CrashLog(Worker(pk=7, queue="engine"))
faulthandler._sigsegv()
"""


@pytest.fixture
def worker(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A dead worker with only the remains that the test gives; no file stays open."""
    settings.DATA_DIR = tmp_path
    opened: list[CrashLog] = []
    begin = CrashLog.__init__

    def noted(self: CrashLog, worker: Worker) -> None:
        begin(self, worker)
        opened.append(self)

    monkeypatch.setattr(CrashLog, "__init__", noted)
    yield Worker(
        pk=7,
        queue="engine",
        hostname=socket.gethostname(),
        figures={"oom_kills": oom_kills()},
    )
    faulthandler.enable()  # pytest's own has the last word again
    for words in opened:
        words._file.close()


def fails(words: CrashLog, error: Exception) -> None:
    with words.noted():
        raise error


def test_a_worker_that_was_killed_from_outside_has_not_crashed(worker: Worker) -> None:
    CrashLog(worker)
    assert not crashed(worker)


def test_a_worker_of_which_nothing_is_known_has_crashed(worker: Worker) -> None:
    assert crashed(worker)


def test_an_error_that_nobody_planned_is_a_crash(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    words = CrashLog(worker)
    with pytest.raises(ZeroDivisionError):
        fails(words, ZeroDivisionError("by zero"))
    assert crashed(worker)
    assert "ZeroDivisionError: by zero" in caplog.text


def test_a_database_that_goes_away_is_no_crash(worker: Worker) -> None:
    words = CrashLog(worker)
    with pytest.raises(OperationalError):
        fails(words, OperationalError("the connection is lost"))
    assert not crashed(worker)


def test_a_fatal_signal_is_a_crash(worker: Worker, tmp_path: Path) -> None:
    environment = {**os.environ, "TINKERAPI_DATA_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", DIES], env=environment, check=False)
    assert done.returncode < 0
    assert crashed(worker)


def test_a_kill_for_want_of_memory_is_a_crash(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    vmstat = tmp_path / "vmstat"
    monkeypatch.setattr(crash_log, "VMSTAT", vmstat)
    vmstat.write_text("pgfault 5\noom_kill 2\n")
    worker.figures = {"oom_kills": oom_kills()}
    CrashLog(worker)
    assert not crashed(worker)
    vmstat.write_text("pgfault 9\noom_kill 3\n")
    assert crashed(worker)


def test_the_words_of_an_earlier_life_are_not_taken_for_this_ones(worker: Worker) -> None:
    words = CrashLog(worker)
    with pytest.raises(ZeroDivisionError):
        fails(words, ZeroDivisionError())
    following = Worker(pk=8, queue="engine", hostname=worker.hostname, figures=worker.figures)
    CrashLog(following)
    assert not crashed(following)


def test_a_worker_that_ends_well_leaves_nothing(worker: Worker, tmp_path: Path) -> None:
    CrashLog(worker).close()
    assert not list((tmp_path / "crashes").iterdir())


def test_the_kernels_count_on_another_machine_is_not_compared(worker: Worker) -> None:
    CrashLog(worker)
    worker.hostname, worker.figures = "elsewhere", {"oom_kills": -1}
    assert not crashed(worker)


@pytest.mark.django_db
def test_only_the_files_of_workers_that_have_ended_are_removed(worker: Worker) -> None:
    living = Worker.objects.create(queue="engine", hostname="elsewhere", pid=1, state="live")
    ended = Worker.objects.create(queue="engine", hostname="elsewhere", pid=2, state="lost")
    other = Worker.objects.create(queue="engine-2", hostname="elsewhere", pid=3, state="lost")
    for one in (living, ended, other):
        CrashLog(one)

    remove_judged("engine")

    assert [crash_file(one).exists() for one in (living, ended, other)] == [True, False, True]
