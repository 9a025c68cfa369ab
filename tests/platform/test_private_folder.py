"""Other users of the machine can read nothing in the data folder."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tinkerapi.server.private_folder import OTHERS, folder_close


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A data folder as an older version left it."""
    folder = tmp_path / "var"
    for name in ("checkpoints/a/weights.npy", "snapshots/b/meta.json", "logs/web.log", "up.lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def readable(folder: Path) -> list[str]:
    paths = [folder, *folder.rglob("*")]
    return [str(path) for path in paths if path.lstat().st_mode & OTHERS]


def test_a_folder_of_an_older_version_is_closed_once(old: Path) -> None:
    assert folder_close(old) == f"{old} is now closed to other users (10 changed)"

    assert readable(old) == []
    assert stat.S_IMODE((old / "checkpoints/a/weights.npy").stat().st_mode) == 0o600
    assert stat.S_IMODE(old.stat().st_mode) == 0o700
    assert folder_close(old) is None


def test_an_interrupted_closing_is_repeated(old: Path) -> None:
    for path in (old / "checkpoints" / "a", old / "logs" / "web.log"):
        path.chmod(0o700)

    folder_close(old)

    assert readable(old) == []


def test_a_folder_with_other_things_keeps_its_mode_and_they_keep_theirs(old: Path) -> None:
    (old / "thesis.tex").write_text("x")
    (old / "thesis.tex").chmod(0o644)

    remark = folder_close(old)

    assert remark == f"{old} has other files too, so its list of names stays readable"
    assert readable(old) == [str(old), str(old / "thesis.tex")]


def test_what_a_link_points_to_is_left_alone(old: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir(mode=0o755)
    elsewhere.chmod(0o755)
    (elsewhere / "shared.bin").write_text("x")
    (elsewhere / "shared.bin").chmod(0o644)
    (old / "models").symlink_to(elsewhere)

    folder_close(old)

    assert len(readable(elsewhere)) == 2
