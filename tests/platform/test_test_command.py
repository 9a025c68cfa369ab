"""``manage.py test``, and the data folders of processes that share a run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.server import ROOT
from tinkerapi.management.commands import test as test_command

DATA_FOLDER = "import tests.settings; print(tests.settings.DATA_DIR)"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ["-n", str(test_command.num_processes()), "--dist", "loadfile"]),
        (["-k", "some"], ["-k", "some"]),
    ],
)
def test_the_whole_suite_uses_all_cores_and_arguments_are_pytests(
    monkeypatch: pytest.MonkeyPatch, given: list[str], expected: list[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "execve", lambda path, command, environment: started.append(command))
    test_command.Command().run_from_argv(["manage.py", "test", *given])
    assert started == [[sys.executable, "-m", "pytest", *expected]]


def test_processes_that_share_a_run_share_no_data_folder_and_their_children_inherit_it() -> None:
    def data_folder(**variables: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", DATA_FOLDER],
            cwd=ROOT,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    own = os.environ["TINKERAPI_TEST_DATA_DIR"]
    assert data_folder() == own
    folders = {data_folder(PYTEST_XDIST_WORKER=name) for name in ("another_0", "another_1")}
    for folder in folders:
        os.rmdir(folder)
    assert len(folders | {own}) == 3
