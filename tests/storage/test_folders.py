"""Folders of both storages: written once, read, listed, copied, deleted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pytest_django import Settings

from training.atomic_directory import new_directory
from training.errors import CheckpointNotFound
from training.storage.chosen import CACHE_FOLDER, storage
from training.storage.interface import AREAS, CHECKPOINTS, SNAPSHOTS, Storage, new_name

CONTENT = {"weights": b"w" * 1000, "meta.json": b"{}", "empty": b""}


@pytest.fixture(params=["data folder", "bucket"])
def any_place(request: pytest.FixtureRequest, settings: Settings, tmp_path: Path) -> Storage:
    if request.param == "bucket":
        found: Storage = request.getfixturevalue("place")
        return found
    settings.DATA_DIR = tmp_path / "data"
    settings.DATA_DIR.mkdir()
    return storage()


def folder_of(content: dict[str, bytes]) -> Callable[[Path], int]:
    """Makes a folder of this content; returns its number of files."""

    def make(target: Path) -> int:
        with new_directory(target) as temporary:
            for name, data in content.items():
                (temporary / name).write_bytes(data)
        return len(content)

    return make


def read_all(place: Storage, directory: str) -> dict[str, bytes]:
    with place.local(directory) as folder:
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def empty_the_cache(settings: Settings) -> None:
    for area in AREAS:
        shutil.rmtree(Path(settings.DATA_DIR) / CACHE_FOLDER / area, ignore_errors=True)


def test_what_was_written_is_read(any_place: Storage, settings: Settings) -> None:
    directory = new_name(CHECKPOINTS)
    assert any_place.write(directory, folder_of(CONTENT)) == 3
    assert read_all(any_place, directory) == CONTENT

    empty_the_cache(settings)
    assert read_all(any_place, directory) == CONTENT
    assert any_place.files(directory) == sorted(CONTENT)
    opened = any_place.open_all(directory)
    assert [(file.name, file.size_bytes) for file in opened] == sorted(
        (name, len(data)) for name, data in CONTENT.items()
    )
    for file in opened:
        file.close()
    for name, data in CONTENT.items():
        with any_place.open(directory, name) as file:
            assert (file.name, file.size_bytes) == (name, len(data))
            assert file.read(0, len(data)) == data
            assert file.read(len(data) // 2, len(data) // 4) == data[: len(data) // 4]


def test_a_failure_leaves_nothing(any_place: Storage, settings: Settings) -> None:
    def fail(target: Path) -> None:
        with new_directory(target) as temporary:
            (temporary / "half").write_bytes(b"x")
            raise CheckpointNotFound("on purpose")

    with pytest.raises(CheckpointNotFound, match="on purpose"):
        any_place.write(new_name(CHECKPOINTS), fail)
    staged = any_place.stage(new_name(CHECKPOINTS), folder_of(CONTENT))
    if any_place.is_remote:
        staged.discard()
        assert not staged.is_stored
        assert list(any_place.folders(CHECKPOINTS)) == []
    files = [path for path in Path(settings.DATA_DIR).rglob("*") if path.is_file()]
    assert len(files) == (0 if any_place.is_remote else len(CONTENT))


def test_what_does_not_exist_is_said(any_place: Storage) -> None:
    directory = new_name(CHECKPOINTS)
    any_place.write(directory, folder_of(CONTENT))
    with pytest.raises(CheckpointNotFound):
        any_place.files(new_name(CHECKPOINTS))
    for where, name in ((new_name(CHECKPOINTS), "weights"), (directory, "nothing")):
        with pytest.raises(CheckpointNotFound):
            any_place.open(where, name)
    with pytest.raises(CheckpointNotFound):
        any_place.copy(new_name(CHECKPOINTS), new_name(CHECKPOINTS))


def test_a_copy_outlives_its_source(any_place: Storage, settings: Settings) -> None:
    source, target = new_name(CHECKPOINTS), new_name(CHECKPOINTS)
    any_place.write(source, folder_of(CONTENT))
    any_place.copy(source, target)
    any_place.purge(source)

    empty_the_cache(settings)
    assert read_all(any_place, target) == CONTENT
    with pytest.raises(CheckpointNotFound):
        any_place.files(source)


def test_all_folders_are_listed_by_area_also_unfinished_ones(any_place: Storage) -> None:
    one, other = new_name(CHECKPOINTS), new_name(SNAPSHOTS)
    any_place.write(one, folder_of(CONTENT))
    any_place.write(other, folder_of(CONTENT))

    [found] = any_place.folders(CHECKPOINTS)
    assert found.directory == one
    assert found.size_bytes >= 1002
    assert found.changed_at == pytest.approx(os.stat(Path.cwd()).st_atime, abs=10**8)
    assert [folder.directory for folder in any_place.folders(SNAPSHOTS)] == [other]
    any_place.purge(one)
    any_place.purge(one)
    assert list(any_place.folders(CHECKPOINTS)) == []


def test_an_installation_has_one_id(any_place: Storage) -> None:
    assert any_place.installation_id() is None
    assert any_place.installation_id(make="one") == "one"
    assert any_place.installation_id(make="another") == any_place.installation_id() == "one"
    assert any_place.problem() is None


def test_of_many_that_claim_a_place_at_once_one_is_first(any_place: Storage) -> None:
    names = [f"server-{number}" for number in range(8)]
    with ThreadPoolExecutor(len(names)) as pool:
        found = set(pool.map(lambda name: any_place.installation_id(make=name), names))
    assert found == {any_place.installation_id()}
    assert found <= set(names)
