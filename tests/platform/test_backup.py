"""A backup has exactly the folders in its dump, whatever appears or disappears meanwhile."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from django.contrib.auth.models import User
from django.db import connection, connections

from tests.environment import command_environment
from tests.server import ROOT
from tinkerapi.server import backup as module
from tinkerapi.server.backup import BackupError, backup_make
from tinkerapi.server.postgres_binaries import program
from training.models import Checkpoint, Run

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def data_dir(settings: Any, tmp_path: Path) -> Path:
    settings.DATA_DIR = tmp_path / "data"
    settings.DATA_DIR.mkdir()
    (settings.DATA_DIR / "secret_key").write_text("hush")
    return Path(settings.DATA_DIR)


def elsewhere(act: Callable[[], None]) -> None:
    """The commits of another process meanwhile."""

    def run() -> None:
        try:
            act()
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


@pytest.fixture
def save(data_dir: Path) -> Callable[[str], None]:
    """``save("a")``: a checkpoint of this name, files first, as the worker does it."""
    owner = User.objects.create_user("ada")
    run = Run.objects.create(
        owner=owner, name="m", base_model="tiny", rank=1, alpha=1, seed=0, state="ready"
    )

    def make(name: str) -> None:
        folder = data_dir / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "weights.npy").write_text(name)
        Checkpoint.objects.create(
            run=run,
            owner=owner,
            path_run=run.name,
            kind="training",
            name=name,
            seq_id=1,
            step=1,
            directory=f"checkpoints/{name}",
            size_bytes=1,
        )

    return make


@pytest.fixture
def delete(data_dir: Path) -> Callable[[str], None]:
    """``delete("a")``: the row first, then the files, as the server does it."""

    def drop(name: str) -> None:
        Checkpoint.objects.filter(name=name).delete()
        shutil.rmtree(data_dir / "checkpoints" / name)

    return drop


def folders(backup: Path) -> set[str]:
    return {path.name for path in (backup / "checkpoints").iterdir()}


def dumped(backup: Path) -> set[str]:
    """The folders that the dump names, read by Postgres's own program."""
    restore = program("pg_restore", major=connection.pg_version // 10_000)  # type: ignore[attr-defined]  # of Postgres's wrapper
    text = subprocess.run(
        [
            str(restore),
            "--data-only",
            "--table=training_checkpoint",
            "--file=-",
            backup / "database.dump",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return set(re.findall(r"\tcheckpoints/(\w+)\t", text))


def during(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int, act: Callable[[], None]
) -> None:
    """Have something happen elsewhere right after the numbered call of one of the steps."""
    step = getattr(module, name)
    calls = 0

    def wrapped(*args: Any) -> Any:
        nonlocal calls
        result = step(*args)
        calls += 1
        if calls == number:
            elsewhere(act)
        return result

    monkeypatch.setattr(module, name, wrapped)


def test_a_backup_has_what_the_database_names_and_nothing_else(
    tmp_path: Path, data_dir: Path, save: Callable[[str], None]
) -> None:
    save("kept")
    (data_dir / "checkpoints" / "left_by_a_crash").mkdir()
    (data_dir / "checkpoints" / ".half.tmp").mkdir()

    made = backup_make(tmp_path / "backup")

    assert folders(tmp_path / "backup") == dumped(tmp_path / "backup") == {"kept"}
    assert (tmp_path / "backup" / "checkpoints" / "kept" / "weights.npy").read_text() == "kept"
    assert (tmp_path / "backup" / "secret_key").read_text() == "hush"
    assert made.folders == 1
    assert not (data_dir / ".backup").exists()


def test_what_is_deleted_while_the_backup_is_made_is_in_it(
    tmp_path: Path,
    save: Callable[[str], None],
    delete: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save("superseded")

    def supersede() -> None:
        delete("superseded")
        save("newer")

    # After the moment was fixed, before the dump is written.
    during(monkeypatch, "directories_named", 1, supersede)

    backup_make(tmp_path / "backup")

    assert folders(tmp_path / "backup") == dumped(tmp_path / "backup") == {"superseded"}


def test_what_is_saved_while_folders_are_linked_is_in_it(
    tmp_path: Path, save: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    save("first")
    during(monkeypatch, "_link_new", 1, lambda: save("second"))

    backup_make(tmp_path / "backup")

    assert folders(tmp_path / "backup") == dumped(tmp_path / "backup") == {"first", "second"}


def test_what_was_made_and_deleted_in_a_blink_makes_it_look_again(
    tmp_path: Path,
    save: Callable[[str], None],
    delete: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    data_dir: Path,
) -> None:
    save("kept")
    during(monkeypatch, "_link_new", 1, lambda: save("brief"))
    link_new = module._link_new

    def late(stage: Path) -> None:
        # Deleted between the moment and the second linking.
        if Checkpoint.objects.filter(name="brief").exists() and (stage / "checkpoints").exists():
            elsewhere(
                lambda: delete("brief") if (data_dir / "checkpoints/brief").exists() else None
            )
        link_new(stage)

    monkeypatch.setattr(module, "_link_new", late)

    backup_make(tmp_path / "backup")

    assert folders(tmp_path / "backup") == dumped(tmp_path / "backup") == {"kept"}


def test_a_database_of_ones_own_is_restored_if_it_is_new(
    tmp_path: Path, save: Callable[[str], None]
) -> None:
    save("kept")
    backup_make(tmp_path / "backup")
    with connection.cursor() as cursor:
        cursor.execute("DROP DATABASE IF EXISTS restored")
        cursor.execute("CREATE DATABASE restored")
    parameters = {
        name: value
        for name, value in connection.get_connection_params().items()
        if name in ("host", "port", "user", "password") and value
    }
    password = f":{quote(str(parameters['password']))}" if "password" in parameters else ""
    port = f":{parameters['port']}" if "port" in parameters else ""
    host = quote(str(parameters["host"]), safe="") + port
    url = f"postgresql://{parameters['user']}{password}@{host}/restored"

    def restore(data_dir: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "manage.py", "restore", str(tmp_path / "backup")],
            cwd=ROOT,
            env=command_environment(tmp_path / data_dir, {"DATABASE_URL": url}),
            capture_output=True,
            text=True,
            check=False,
        )

    try:
        first, second = restore("there"), restore("elsewhere")
        with psycopg.connect(**parameters, dbname="restored") as restored:
            rows = restored.execute("SELECT directory FROM training_checkpoint").fetchall()
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP DATABASE restored WITH (FORCE)")

    assert first.returncode == 0, first.stderr
    assert rows == [("checkpoints/kept",)]
    assert (tmp_path / "there" / "checkpoints" / "kept" / "weights.npy").read_text() == "kept"
    assert second.returncode == 1
    assert "has tables already" in second.stderr


def test_a_missing_folder_is_said_and_nothing_is_left(
    tmp_path: Path, data_dir: Path, save: Callable[[str], None]
) -> None:
    save("lost")
    shutil.rmtree(data_dir / "checkpoints" / "lost")

    with pytest.raises(BackupError, match="is missing"):
        backup_make(tmp_path / "backup")

    assert not (tmp_path / "backup").exists()
    assert not (data_dir / ".backup").exists()


def test_what_a_killed_backup_left_is_gone_after_the_next(
    tmp_path: Path, data_dir: Path, save: Callable[[str], None]
) -> None:
    save("kept")
    (data_dir / ".backup" / "checkpoints" / "left").mkdir(parents=True)

    backup_make(tmp_path / "backup")

    assert folders(tmp_path / "backup") == {"kept"}
    assert not (data_dir / ".backup").exists()


def test_two_backups_at_once_are_one_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(BackupError) as error:
            backup_make(tmp_path / "second")
        refused.append(str(error.value))

    during(monkeypatch, "directories_named", 1, second)
    backup_make(tmp_path / "first")

    assert refused == ["another backup is being made; wait for it"]
    assert (tmp_path / "first").is_dir()


def test_a_backup_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "backup").mkdir()
    with pytest.raises(BackupError, match="exists already"):
        backup_make(tmp_path / "backup")


def test_a_program_of_postgres_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.ensure_connection()
    monkeypatch.setenv("PGOPTIONS", "--no_such_setting=1")
    with pytest.raises(BackupError, match=r"pg_dump failed: .*no_such_setting"):
        backup_make(tmp_path / "backup")
    assert not (tmp_path / "backup").exists()
