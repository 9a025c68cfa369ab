"""What ends a group of ranks: different results, and the loss or the hang of one of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.server import ROOT


def run(what: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.engine.group.broken_group", what, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_ranks_with_different_results_end(tied_folder: Path) -> None:
    done = run("differs", tied_folder)
    assert done.returncode == 1
    assert "GroupBroken: The outcome of optim_step differs between the ranks" in done.stderr
    assert done.stdout == ""


def test_the_leader_of_a_killed_rank_ends_without_the_trace_of_a_crash(tied_folder: Path) -> None:
    """Otherwise the requests that ran would be blamed for it."""
    done = run("killed", tied_folder)
    assert done.returncode == 1
    assert "rank 1 has ended (SIGKILL), and this worker with it" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("when", ["at once", "while loading"])
def test_a_rank_that_hangs_before_the_group_works_ends_it_after_a_while(
    when: str, tied_folder: Path
) -> None:
    """And the folder is not blamed: then the worker would not be started again."""
    done = run(f"stopped {when}", tied_folder)
    assert done.returncode == 1
    assert "GroupBroken: the ranks of tiny could not load it together" in done.stderr
    assert "T (stopped)" in done.stderr
    assert "BaseModelNotFound" not in done.stderr
    assert done.stdout == ""


def test_a_rank_that_is_killed_while_loading_is_not_the_folders_fault(tied_folder: Path) -> None:
    done = run("killed while loading", tied_folder)
    assert done.returncode == 1
    assert "rank 1 has ended (SIGKILL), and this worker with it" in done.stderr
    assert "BaseModelNotFound" not in done.stderr
    assert done.stdout == ""
