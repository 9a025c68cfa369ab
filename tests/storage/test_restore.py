"""A backup of a bucket, restored to another prefix and to a data folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from django.contrib.auth.models import User
from django.db import connection
from pytest_django import Settings

from tests.environment import command_environment
from tests.server import ROOT
from tests.storage.test_folders import CONTENT, empty_the_cache, folder_of, read_all
from tinkerapi.server.backup import backup_make
from training.models import Checkpoint, Run
from training.storage.chosen import storage
from training.storage.interface import CHECKPOINTS, new_name
from training.storage.remote import RemoteFolders

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def new_database() -> Iterator[Callable[[str], str]]:
    """``new_database("a")``: the address of an empty database of this name."""
    made: list[str] = []
    parameters = connection.get_connection_params()

    def make(name: str) -> str:
        made.append(name)
        with connection.cursor() as cursor:
            cursor.execute(f"DROP DATABASE IF EXISTS {name}")
            cursor.execute(f"CREATE DATABASE {name}")
        password = f":{quote(parameters['password'])}" if parameters.get("password") else ""
        port = f":{parameters['port']}" if parameters.get("port") else ""
        host = quote(str(parameters["host"]), safe="") + port
        return f"postgresql://{parameters['user']}{password}@{host}/{name}"

    yield make
    with connection.cursor() as cursor:
        for name in made:
            cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_a_backup_brings_the_files_from_a_bucket_to_any_storage(
    place: RemoteFolders,
    settings: Settings,
    tmp_path: Path,
    new_database: Callable[[str], str],
    another_machine: Callable[[], None],
) -> None:
    owner = User.objects.create_user("ada")
    run = Run.objects.create(
        owner=owner, name="m", base_model="tiny", rank=1, alpha=1, seed=0, state="ready"
    )
    directory = new_name(CHECKPOINTS)
    place.write(directory, folder_of(CONTENT))
    place.write(new_name(CHECKPOINTS), folder_of({"left": b"by a crash"}))
    Checkpoint.objects.create(
        run=run,
        owner=owner,
        path_run="m",
        kind="training",
        name="kept",
        seq_id=1,
        step=1,
        directory=directory,
        size_bytes=1,
    )
    empty_the_cache(settings)
    assert backup_make(tmp_path / "backup").folders == 1

    def restore(name: str, url: str) -> subprocess.CompletedProcess[str]:
        changes = {"DATABASE_URL": new_database(name), "TINKERAPI_STORAGE": url}
        amazon = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
        return subprocess.run(
            [sys.executable, "manage.py", "restore", str(tmp_path / "backup")],
            cwd=ROOT,
            env=command_environment(tmp_path / name, {**amazon, **changes}),
            capture_output=True,
            text=True,
            check=False,
        )

    used = restore("used", settings.STORAGE)
    assert used.returncode == 1
    assert "is in use, it has folders; set TINKERAPI_STORAGE to a new prefix" in used.stderr
    for name, url in (("bucket", f"{settings.STORAGE}/restored"), ("local", "")):
        done = restore(name, url)
        assert done.returncode == 0, done.stderr
        another_machine()
        settings.STORAGE = url
        if not url:
            settings.DATA_DIR = tmp_path / name
        assert [folder.directory for folder in storage().folders(CHECKPOINTS)] == [directory]
        assert read_all(storage(), directory) == CONTENT
