"""``manage.py sweepfiles``: folders that no row refers to are found, and deleted only on
request."""

from __future__ import annotations

import os
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command

from tests.conftest import InProcessWorker
from tests.sdk.conftest import SdkClient
from training.models import Checkpoint

TWO_DAYS = 2 * 24 * 3600


def sweep(*arguments: str) -> str:
    output = StringIO()
    call_command("sweepfiles", *arguments, stdout=output)
    return output.getvalue()


def aged(path: Path) -> Path:
    moment = time.time() - TWO_DAYS
    os.utime(path, (moment, moment))
    return path


def test_only_old_folders_that_no_row_names_are_deleted_and_only_if_told_to(
    sdk: SdkClient, work: InProcessWorker, settings: Any, tmp_path: Path
) -> None:
    settings.DATA_DIR = tmp_path
    sdk.post("save_weights", model_id=sdk.model(), seq_id=1, path="a")
    work()
    named = aged(tmp_path / Checkpoint.objects.get().directory)
    left = []
    for name in ("checkpoints/left", "checkpoints/.plain-left", "snapshots/left"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights").write_bytes(b"1234")
        left.append(aged(tmp_path / name))
    young = tmp_path / "checkpoints" / "young"
    young.mkdir()

    listed = sweep()
    assert all(str(path) in listed and path.exists() for path in left)
    assert "3 folders found" in listed
    assert "3 folders deleted" in sweep("--delete")
    assert not any(path.exists() for path in left)
    assert named.exists()
    assert young.exists()
    assert "0 folders found" in sweep()


@pytest.mark.django_db
def test_without_a_data_folder_there_is_nothing_to_find(settings: Any, tmp_path: Path) -> None:
    settings.DATA_DIR = tmp_path
    assert "0 folders found" in sweep()
