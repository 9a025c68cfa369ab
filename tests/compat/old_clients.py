"""Run the core flow with older versions of the SDK against a whole server, and keep the outcome.

    python -m tests.compat.old_clients [VERSION ...]

Each version gets an environment of its own. What it needs beside itself, torch above all, it
finds in the environment that runs this: the client's own code is what is tested here. Writes
``results.json`` and the table in ``tinkerapi/docs/sdk.md``; needs a package index.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests.compat.tables import markdown_table, write_table
from tests.server import ROOT, Server, free_port
from tests.tiny_model import make_tiny_model

CURRENT = version("tinker")
OLD = ("0.5.1", "0.18.2", "0.24.1", "0.30.4", "0.36.0")
RESULTS = Path(__file__).parent / "results.json"
FLOW_SECONDS = 300
SKIPPED, NOT_REACHED = "not in this version", "not reached"

Outcomes = dict[str, bool | str]


def make_environment(folder: Path, client_version: str) -> Path:
    """An environment with this version of the SDK; its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    library = next((folder / "lib").iterdir()) / "site-packages"
    (library / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", f"tinker=={client_version}"], check=True
    )
    return python


def run_flow(server: Server, python: Path) -> Outcomes:
    """The core flow's steps and how each ended."""
    key = re.search(r"tml-\S+", server.log())
    assert key is not None
    process = subprocess.run(
        [str(python), str(Path(__file__).with_name("core_flow.py"))],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(server.data_dir),  # so that no credentials of a person are read
            "TINKER_BASE_URL": server.url,
            "TINKER_API_KEY": key.group(),
            "BASE_MODEL": Path(server.environment["TINKERAPI_BASE_MODEL"]).name,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",  # the SDK's own deprecations
        },
        capture_output=True,
        text=True,
        timeout=FLOW_SECONDS,
    )
    lines = process.stdout.strip().splitlines()
    if process.returncode or not lines:
        return {"start": (process.stderr or process.stdout)[-300:]}
    outcomes: Outcomes = json.loads(lines[-1])
    return outcomes


def commit() -> str:
    """The checkout that was tested, and whether it had uncommitted changes."""
    shown = subprocess.run(
        ["/usr/bin/env", "git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return shown.stdout.strip()


def compatibility_table(outcomes: dict[str, Outcomes]) -> str:
    """Markdown: a row for each step, a column for each version."""
    versions = sorted(outcomes, key=lambda name: tuple(map(int, name.split("."))))
    steps = list(max(outcomes.values(), key=len))
    rows = [["", *versions]]
    for step in steps:
        cells = [outcomes[name].get(step, NOT_REACHED) for name in versions]
        rows.append([step.replace("_", " "), *map(_cell, cells)])
    return markdown_table(rows)


def _cell(outcome: bool | str) -> str:
    if outcome is True or outcome in (SKIPPED, NOT_REACHED):
        return "works" if outcome is True else str(outcome)
    return f"fails: {str(outcome).split(':')[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", default=[*OLD, CURRENT])
    chosen: list[str] = parser.parse_args().versions
    outcomes: dict[str, Outcomes] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = make_tiny_model(Path(folder) / "tiny")
        server = Server(
            Path(folder) / "data",
            free_port(),
            {"TINKERAPI_BASE_MODEL": str(base), "TINKERAPI_DTYPE": "float32"},
        )
        server.data_dir.mkdir()
        server.start()
        try:
            for name in chosen:
                python = (
                    Path(sys.executable)
                    if name == CURRENT
                    else make_environment(Path(folder) / name, name)
                )
                outcomes[name] = run_flow(server, python)
        finally:
            server.stop()
    results = {
        "versions": outcomes,
        "commit": commit(),
        "python": platform.python_version(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    write_table("versions", compatibility_table(outcomes))


if __name__ == "__main__":
    main()
