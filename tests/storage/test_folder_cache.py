"""The cache of a remote storage: bounded, shared by processes, and never emptied under a reader."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.storage import folder_cache
from training.storage.folder_cache import FolderCache


def put(cache: FolderCache, name: str, size: int = 100, *, used_at: float | None = None) -> None:
    work = cache.work_folder()
    folder = work.path / "folder"
    folder.mkdir()
    (folder / "data").write_bytes(bytes(size))
    cache.adopt(folder, f"checkpoints/{name}")
    work.remove()
    if used_at is not None:
        with cache.reading(f"checkpoints/{name}") as path:
            assert path is not None
            os.utime(path, (used_at, used_at))


def held(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints").iterdir())


def test_the_least_recently_used_leave_first(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path, 250)
    for number in range(4):
        put(cache, f"{number}", used_at=number)
    with cache.reading("checkpoints/0") as path:
        assert path is not None
    cache.trim()
    assert held(tmp_path) == ["0", "3"]


def test_what_is_read_stays_even_beyond_the_limit(tmp_path: Path) -> None:
    cache, other = FolderCache(tmp_path, 0), FolderCache(tmp_path, 0)
    put(cache, "a")
    put(cache, "b")
    with cache.reading("checkpoints/a") as path:
        assert path is not None
        other.trim()
        other.drop("checkpoints/a")
        assert (path / "data").read_bytes() == bytes(100)
    assert held(tmp_path) == ["a"]
    other.trim()
    assert held(tmp_path) == []
    with cache.reading("checkpoints/a") as path:
        assert path is None


def test_of_two_that_bring_the_same_folder_one_is_kept(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path, 1000)
    put(cache, "a", 10)
    put(cache, "a", 20)
    with cache.reading("checkpoints/a") as path:
        assert path is not None
        assert (path / "data").stat().st_size == 10
    assert list((tmp_path / "work").iterdir()) == []


def test_what_a_killed_process_left_is_deleted_and_what_a_live_one_makes_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_cache, "YOUNG_SECONDS", -1.0)
    cache = FolderCache(tmp_path, 1000)
    program = (
        "import os, sys; from pathlib import Path\n"
        "from training.storage.folder_cache import FolderCache\n"
        "work = FolderCache(Path(sys.argv[1]), 0).work_folder()\n"
        "(work.path / 'half').write_text('x'); print(work.path.name, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    name = killed.stdout.strip()
    live = cache.work_folder()
    assert {path.name for path in (tmp_path / "work").iterdir()} == {name, live.path.name}
    cache.trim()
    assert [path.name for path in (tmp_path / "work").iterdir()] == [live.path.name]
    live.remove()


def test_nothing_in_it_can_be_read_by_other_users(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path / "cache", 1000)
    put(cache, "a")
    for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]:
        assert not path.stat().st_mode & 0o077, path
