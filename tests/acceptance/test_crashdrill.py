"""Ten kills in a real training job: not one bit is different afterwards, with any workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.vllm.double_program import double_python
from tests.server import ROOT
from tinkerapi.drill.kills import TARGETS

pytestmark = pytest.mark.acceptance

KILLS = 10


def drill(tmp_path: Path, *arguments: str) -> dict[str, str]:
    """Run the command, which must find no difference; its figures by name."""
    result = tmp_path / "drill.json"
    done = subprocess.run(
        [sys.executable, "manage.py", "crashdrill", *arguments, "--json", str(result)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {row["figure"]: row["value"] for row in json.loads(result.read_text())["rows"]}


@pytest.mark.parametrize("workers", [1, 2])
def test_ten_kills_change_nothing(tmp_path: Path, workers: int) -> None:
    arguments = ["--kills", str(KILLS), "--adapters", "4", "--steps", "12"]
    rows = drill(tmp_path, *arguments, "--workers", str(workers))
    assert rows["kills"] == f"{KILLS} of {KILLS} planned"
    assert rows["differences"] == "0"
    assert int(rows["of worker"]) == KILLS * TARGETS["worker"] / 100
    assert int(rows["rebuilds by replay"]) > 0
    assert int(rows["futures that ran again"]) > 0
    assert int(rows["requests sent again"]) > 0


def test_kills_of_a_vllm_server_and_its_worker_change_nothing(tmp_path: Path) -> None:
    arguments = ["--kills", "5", "--adapters", "2", "--steps", "8"]
    rows = drill(tmp_path, *arguments, "--vllm-python", str(double_python(tmp_path / "python")))
    assert rows["kills"] == "5 of 5 planned"
    assert rows["of vllm"] == "1"
    assert rows["differences"] == "0"
