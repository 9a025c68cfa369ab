"""Moments are seen when they come, and not waited for when they do not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from django.db import transaction

from futures import finishing
from futures.database import dedicated_parameters, execute
from tinkerapi.drill import moments
from tinkerapi.drill.moments import Aim, Moment
from tinkerapi.drill.transport import Progress
from training.worker import loop


@pytest.fixture
def progress() -> Progress:
    return Progress()


@pytest.fixture
def aim(progress: Progress, tmp_path: Path) -> Aim:
    return Aim(tmp_path, progress)


def once_waiting(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Act between two checks of the folder."""
    monkeypatch.setattr(moments.time, "sleep", lambda seconds: act())


@pytest.mark.parametrize(
    ("moment", "folder"), [*moments.FOLDERS.items(), ("checkpoint", "storage_cache/work")]
)
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


FINISHING = ("ids", "results", "summaries", "errors", "categories", "error_codes")
ADVANCING = ("ids", "steps", "applied", "tokens")


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("statement", "lists"),
    [(finishing._FINISH, FINISHING), (loop._ADVANCE, ADVANCING)],
    ids=["finish", "advance"],
)
def test_the_statements_of_a_workers_commit_are_a_moment(
    aim: Aim, monkeypatch: pytest.MonkeyPatch, statement: str, lists: tuple[str, ...]
) -> None:
    """Postgres shows a transaction's last statement until the transaction is over."""
    monkeypatch.setattr(moments, "connect", lambda _: psycopg.connect(**dedicated_parameters()))
    with transaction.atomic():
        execute(statement, {"worker_id": 0, "batch": 1, **{name: [] for name in lists}})
        assert aim.wait_for("commit")
        execute("SELECT", {})
        monkeypatch.setattr(moments, "WAIT_SECONDS", 0.01)
        assert not aim.wait_for("commit")


@pytest.mark.parametrize("moment", ["anytime", "recovery"])
def test_any_time_is_now(aim: Aim, moment: Moment) -> None:
    assert aim.wait_for(moment)
