"""When the disk will be full: from notes of the last days, or not at all."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from tinkerapi.server.disk_history import FILE, Note, disk_history, disk_note, full_in

NOW = 1_800_000_000.0
HOUR, DAY, GIB = 3600.0, 86400.0, 2**30


def notes(days: float, *, per_day: float, free: float = 100) -> list[Note]:
    """Hourly notes until now of a disk that now has ``free`` GiB and loses ``per_day``."""
    hours = int(days * 24)
    return [
        Note(NOW - hour * HOUR, round((free + per_day * hour / 24) * GIB))
        for hour in range(hours, -1, -1)
    ]


def forecast(history: list[Note], free: float = 100) -> timedelta | None:
    return full_in(history, free_bytes=round(free * GIB), now=NOW)


@pytest.mark.parametrize("days", [1, 2, 7])
@pytest.mark.parametrize(("per_day", "expected"), [(10, 10), (50, 2), (1, 100)])
def test_steady_growth_reaches_the_end_after_free_divided_by_growth(
    days: float, per_day: float, expected: float
) -> None:
    found = forecast(notes(days, per_day=per_day))

    assert found is not None
    assert found / timedelta(days=1) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "history",
    [
        [],
        notes(0.9, per_day=10),
        notes(7, per_day=0),
        notes(7, per_day=-10),
        notes(7, per_day=0.2),
    ],
    ids=["nothing", "too short", "no growth", "it shrinks", "years"],
)
def test_there_is_no_forecast_without_reason(history: list[Note]) -> None:
    assert forecast(history) is None


def test_one_large_download_and_one_clean_up_move_it_little() -> None:
    steady = notes(7, per_day=10)
    download = [
        Note(n.at, n.free_bytes + (200 * GIB if n.at < NOW - 3 * DAY else 0)) for n in steady
    ]
    clean_up = [
        Note(n.at, n.free_bytes - (60 * GIB if n.at < NOW - 6 * DAY else 0)) for n in steady
    ]

    for history in (download, clean_up):
        found = forecast(history)
        assert found is not None
        assert 5 < found / timedelta(days=1) < 20


def test_only_the_last_week_counts() -> None:
    week = notes(7, per_day=10)
    before = [Note(NOW - 20 * DAY + hour * HOUR, 10**15) for hour in range(100)]

    assert forecast(before + week) == forecast(week)


def test_a_note_is_taken_every_hour_and_kept_for_eight_days(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 1000
    usage = SimpleNamespace(total=2000, used=0)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(**vars(usage), free=free)
    )
    for minutes in range(0, 10 * 24 * 60, 20):
        free -= 0 if minutes % 60 else 1
        disk_note(tmp_path, now=NOW + minutes * 60)

    found = disk_history(tmp_path)
    assert len(found) == 8 * 24
    assert [note.at - found[0].at for note in found[:3]] == [0, HOUR, 2 * HOUR]
    assert found[-1].free_bytes == 1000 - 10 * 24


def test_damaged_notes_and_a_clock_that_was_wrong_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"\xff\n12\n1800000000 x\n9900000000 5\n1799990000 7\n")
    assert disk_history(tmp_path) == [Note(1799990000, 7), Note(9900000000, 5)]
    disk_note(tmp_path, now=NOW)
    assert [note.at for note in disk_history(tmp_path)] == [1799990000, NOW]


def test_a_folder_that_is_gone_takes_no_notes(tmp_path: Path) -> None:
    disk_note(tmp_path / "gone", now=NOW)
    assert disk_history(tmp_path / "gone") == []
