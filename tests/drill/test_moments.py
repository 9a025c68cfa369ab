"""Moments are seen when they come, and not waited for when they do not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tinkerapi.drill import moments
from tinkerapi.drill.moments import Aim, Moment
from tinkerapi.drill.transport import Progress


@pytest.fixture
def progress() -> Progress:
    return Progress()


@pytest.fixture
def aim(progress: Progress, tmp_path: Path) -> Aim:
    return Aim(tmp_path, progress)


def once_waiting(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something between two looks at the folder."""
    monkeypatch.setattr(moments.time, "sleep", lambda seconds: act())


@pytest.mark.parametrize(("moment", "folder"), moments.FOLDERS.items())
def test_a_folder_that_is_being_written_is_a_moment(
    aim: Aim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: Moment, folder: str
) -> None:
    (tmp_path / folder / "old").mkdir(parents=True)
    once_waiting(monkeypatch, (tmp_path / folder / ".new.partial").mkdir)
    assert aim.wait_for(moment)


@pytest.mark.parametrize("moment", ["submission", "answer"])
def test_what_a_client_does_is_a_moment(aim: Aim, progress: Progress, moment: Moment) -> None:
    acts = {"submission": progress.submits, "answer": lambda: progress.answers(0.1)}
    over = threading.Event()

    def act() -> None:
        while not over.wait(0.001):
            acts[moment]()

    acting = threading.Thread(target=act)
    acting.start()
    assert aim.wait_for(moment)
    over.set()
    acting.join()


@pytest.mark.parametrize("moment", ["submission", "answer", "commit", "snapshot", "checkpoint"])
def test_a_moment_that_does_not_come_is_not_waited_for(
    aim: Aim, monkeypatch: pytest.MonkeyPatch, moment: Moment
) -> None:
    monkeypatch.setattr(moments, "WAIT_SECONDS", 0.01)
    assert not aim.wait_for(moment)


@pytest.mark.parametrize("moment", ["anytime", "recovery"])
def test_any_time_is_now(aim: Aim, moment: Moment) -> None:
    assert aim.wait_for(moment)
