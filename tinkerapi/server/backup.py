"""Backups of a running server: the database, and the files that it refers to.

Folders of checkpoints and snapshots never change. A folder gets its name when it is complete,
before a row refers to it, and loses its name after its row is gone. So no lock is needed, but the
order matters. The database first would miss folders deleted while files are copied: of a busy run,
every snapshot. Files first would miss folders saved while they are copied: checkpoints that clients
were told about. Hence:

1. link all folders, which takes no time and no space;
2. take a snapshot of the database;
3. link the new folders. Every folder in that snapshot was linked in 1, or is linked
   now, unless it was both made and deleted within these few milliseconds;
4. dump that snapshot, and check that every folder in it was linked; otherwise repeat from 2;
5. move everything to the target folder, which is slow if that is on another disk.

Folders in a bucket are downloaded instead of linked, in the same order: those that the database
names now, then those that the snapshot names. A backup has the same form wherever the folders were,
and is restored to the storage of the settings.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import connection, transaction
from django.utils import timezone

from tinkerapi.server.last_backup import last_backup_record
from tinkerapi.server.postgres import EmbeddedPostgres
from tinkerapi.server.postgres_binaries import program
from training.base_models import base_models
from training.errors import CheckpointNotFound, StorageFailed, StorageFull
from training.selectors import directories_named
from training.storage.chosen import storage
from training.storage.interface import AREAS

DUMP, MANIFEST, SECRET_KEY = "database.dump", "backup.json", "secret_key"
ATTEMPTS = 5


class BackupError(Exception):
    """The backup was not made or not restored; the message is for the operator."""


@dataclass(frozen=True)
class Backup:
    """The contents of a backup."""

    made_at: str
    version: str
    base_models: list[str]
    """The base models that the runs need; their folders are not in the backup."""
    folders: int
    size_bytes: int
    """Size of all files, the dump included."""


def backup_make(target: Path) -> Backup:
    """Write a backup to a new folder; the server may keep running.

    Raises:
        BackupError: The folder exists, or a program failed.
        OperationalError: Django's; no database answers.
    """
    if target.exists():
        raise BackupError(f"{target} exists already; name a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _stage() as stage:
        _link_new(stage)
        named = _dump_moment(stage)
        for path in [path for area in AREAS for path in (stage / area).iterdir()]:
            if f"{path.parent.name}/{path.name}" not in named:
                shutil.rmtree(path)
        secret_key = settings.DATA_DIR / SECRET_KEY
        if secret_key.exists():
            shutil.copy2(secret_key, stage / SECRET_KEY)
        backup = Backup(
            made_at=timezone.now().isoformat(timespec="seconds"),
            version=str(settings.SPECTACULAR_SETTINGS["VERSION"]),
            base_models=[model.name for model in base_models()],
            folders=len(named),
            size_bytes=sum(path.stat().st_size for path in stage.rglob("*") if path.is_file()),
        )
        (stage / MANIFEST).write_text(json.dumps(vars(backup), indent=2) + "\n")
        unfinished = target.with_name(f".{target.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.move(stage, unfinished)
        unfinished.rename(target)
    last_backup_record(datetime.fromisoformat(backup.made_at))
    return backup


def backup_restore(source: Path) -> Backup:
    """Fill the data folder of the settings, and its database, from a backup.

    Both must be new. The tables are written in one transaction at the very end.

    Raises:
        BackupError: It is not a backup, the data folder or database is in use, or a program failed.
        PostgresError: The embedded Postgres did not start.
    """
    try:
        backup = Backup(**json.loads((source / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise BackupError(f"{source} is not a complete backup: {error}") from error
    used = [name for name in (*AREAS, "postgres") if (settings.DATA_DIR / name).exists()]
    if used:
        raise BackupError(
            f"{settings.DATA_DIR} is in use, it has {', '.join(used)}; set TINKERAPI_DATA_DIR to a "
            "new folder"
        )
    with _empty_database(), _storage_errors():
        if any(next(storage().folders(area), None) is not None for area in AREAS):
            raise BackupError(
                f"{storage().location} is in use, it has folders; set TINKERAPI_STORAGE to a new "
                "prefix"
            )
        settings.DATA_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in [path for area in AREAS for path in (source / area).iterdir()]:
            storage().write(f"{path.parent.name}/{path.name}", partial(shutil.copytree, path))
        if (source / SECRET_KEY).exists():
            shutil.copy2(source / SECRET_KEY, settings.DATA_DIR / SECRET_KEY)
        _run(
            "pg_restore",
            *("--exit-on-error", "--single-transaction", "--no-owner", "--no-privileges"),
            f"--dbname={_parameters()['dbname']}",
            str(source / DUMP),
        )
        connection.close()
    return backup


@contextmanager
def _stage() -> Iterator[Path]:
    """An empty folder to assemble a backup in. It is in the data folder, because hard links cannot
    leave their disk."""
    stage = settings.DATA_DIR / ".backup"
    with (settings.DATA_DIR / ".backup.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackupError("another backup is being made; wait for it") from None
        shutil.rmtree(stage, ignore_errors=True)  # left by a killed backup
        stage.mkdir(mode=0o700)
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _link_new(stage: Path) -> None:
    """Link every folder that was not linked yet; skip folders that disappear meanwhile."""
    for folder in AREAS:
        (stage / folder).mkdir(exist_ok=True)
    if storage().is_remote:
        _download_new(stage)
        return
    for folder in AREAS:
        here = settings.DATA_DIR / folder
        # A folder whose name begins with a dot is being written.
        names = [path.name for path in here.glob("[!.]*")] if here.is_dir() else []
        for name in names:
            link = stage / folder / name
            if not link.exists():
                try:
                    shutil.copytree(here / name, link, copy_function=os.link)
                except (FileNotFoundError, shutil.Error):
                    shutil.rmtree(link, ignore_errors=True)  # it was being deleted


def _download_new(stage: Path) -> None:
    """Download every folder that the database names and that is not here yet."""
    for directory in sorted(directories_named()):
        link = stage / directory
        if not link.exists():
            # Not found: it was being deleted.
            with (
                suppress(CheckpointNotFound),
                _storage_errors(),
                storage().local(directory) as path,
            ):
                shutil.copytree(path, link, copy_function=os.link)


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except (StorageFailed, StorageFull) as error:
        raise BackupError(f"{storage().location}: {error}") from error


def _dump_moment(stage: Path) -> Set[str]:
    """Dump a snapshot of the database; return the folders in it, all of which are linked."""
    for _ in range(ATTEMPTS):
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            cursor.execute("SELECT pg_export_snapshot()")
            [moment] = cursor.fetchone()
            _link_new(stage)
            named = directories_named()
            if all((stage / directory).is_dir() for directory in named):
                dump = stage / DUMP
                _run("pg_dump", "--format=custom", f"--snapshot={moment}", f"--file={dump}")
                return named
    raise BackupError(
        f"a folder in the database is missing in {storage().location}, in each of "
        f"{ATTEMPTS} attempts; see `python manage.py doctor`"
    )


@contextmanager
def _empty_database() -> Iterator[None]:
    """The settings' database, running and without tables."""
    if settings.DATABASE_URL:
        if connection.introspection.table_names():
            raise BackupError("the database of DATABASE_URL has tables already; make a new one")
        yield
        return
    with EmbeddedPostgres(settings.DATA_DIR):
        yield


def _parameters() -> dict[str, Any]:
    parameters = connection.get_connection_params()
    return {
        name: parameters[name]
        for name in ("host", "port", "user", "password", "dbname")
        if parameters.get(name)
    }


def _run(name: str, *arguments: str) -> None:
    """Run one of Postgres's programs on the settings' database.

    Raises:
        BackupError: It is not installed, or it failed.
    """
    with connection.cursor() as cursor:
        cursor.execute("SHOW server_version_num")
        major = int(cursor.fetchone()[0]) // 10_000
    found = program(name, major=major)
    if found is None:
        raise BackupError(f"no {name} of PostgreSQL {major} or later was found; install it")
    words = {"dbname": "PGDATABASE"}
    environment = {
        words.get(key, f"PG{key.upper()}"): str(value) for key, value in _parameters().items()
    }
    answer = subprocess.run(  # noqa: S603
        [str(found), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode != 0:
        raise BackupError(f"{name} failed: {answer.stderr.strip()[-500:]}")
