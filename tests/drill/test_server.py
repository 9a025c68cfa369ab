"""A drilled server is the default one, and computes as the one beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tinkerapi.drill.server import DrilledServer


def test_limits_and_keys_of_another_server_do_not_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKERAPI_REQUIRE_API_KEY", "1")
    monkeypatch.setenv("TINKERAPI_MAX_PENDING", "1")
    monkeypatch.setenv("TINKERAPI_DATA_DIR", "/nowhere")
    monkeypatch.setenv("TINKERAPI_DTYPE", "float32")
    monkeypatch.setenv("DATABASE_URL", "postgresql://db/production")

    environment = DrilledServer(tmp_path, environment={"DATABASE_URL": ""}).full_environment()

    ours = {name: value for name, value in environment.items() if name.startswith("TINKERAPI_")}
    assert ours == {"TINKERAPI_DTYPE": "float32", "TINKERAPI_DATA_DIR": str(tmp_path)}
    assert environment["DATABASE_URL"] == ""


def test_everything_below_is_found_parents_first(tmp_path: Path) -> None:
    server = DrilledServer(tmp_path)
    assert server.processes() == []
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE) as process:
        server.process = process
        while not (found := server.processes()) or "input()" not in found[0].command:
            assert process.poll() is None
        assert [item.parent for item in found] == [process.pid]
        assert process.stdin is not None
        process.stdin.close()
    assert server.has_ended()
