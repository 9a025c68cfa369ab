"""The crash drill at its full length, with its table stored.

    python tests/benchmarks/crashdrill.py [--model-folder PATH]

What it does and what it compares: ``manage.py crashdrill --help``. With a model folder, a second
and shorter drill is made on that base model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.report import commit, machine, results_option
from tests.server import ROOT

SETTINGS = "settings of "
"""Before a drill's name, the key of its settings in the table."""


def drill(*arguments: object) -> dict[str, Any]:
    """A drill's report as JSON; ends this process if it finds a difference."""
    with tempfile.TemporaryDirectory(prefix="tinkerapi-bench-") as folder:
        result = Path(folder) / "drill.json"
        command = [sys.executable, "manage.py", "crashdrill", "--json", str(result)]
        subprocess.run([*command, *map(str, arguments)], cwd=ROOT, check=True)
        content: dict[str, Any] = json.loads(result.read_text())
        return content


def side_by_side(drills: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One table of all drills, a column each, and their settings."""
    values = {
        name: {row["figure"]: row["value"] for row in content["rows"]}
        for name, content in drills.items()
    }
    figures = list(dict.fromkeys(figure for column in values.values() for figure in column))
    last = list(drills.values())[-1]
    return {
        "rows": [
            {"figure": figure, **{name: values[name].get(figure, "0") for name in drills}}
            for figure in figures
        ],
        **{
            f"{SETTINGS}{name}": {**content["settings"], "date": content["date"]}
            for name, content in drills.items()
        },
        "date": last["date"],
        "versions": last["versions"],
        "machine": asdict(machine()),
        "commit": commit(),
    }


def beside_earlier(table: dict[str, Any], path: Path) -> dict[str, Any]:
    """The table with the drills that were stored at the path before and were not made again."""
    if not path.exists():
        return table
    earlier = json.loads(path.read_text())
    names, again = (
        [key.removeprefix(SETTINGS) for key in each if key.startswith(SETTINGS)]
        for each in (earlier, table)
    )
    rows: dict[str, dict[str, str]] = {}
    for content, columns in ((table, again), (earlier, [n for n in names if n not in again])):
        for row in content["rows"]:
            of_figure = rows.setdefault(row["figure"], {})
            of_figure |= {name: row[name] for name in columns if name in row}
    settings = {key: value for key, value in earlier.items() if key.startswith(SETTINGS)}
    columns = list(dict.fromkeys([*names, *again]))
    complete = [
        {"figure": figure, **{name: row.get(name, "0") for name in columns}}
        for figure, row in rows.items()
    ]
    return {**settings, **table, "rows": complete}


def main() -> None:
    parser = argparse.ArgumentParser(description="manage.py crashdrill, with its table stored")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--model-folder", type=Path, help="of a second drill's base model")
    parser.add_argument("--model-kills", type=int, default=30)
    results_option(parser)
    options = parser.parse_args()
    drills = {"tiny model": drill("--kills", options.kills)}
    if options.model_folder is not None:
        folder = options.model_folder.resolve()
        shorter = ("--kills", options.model_kills, "--steps", 12, "--adapters", 4)
        drills[folder.name] = drill(*shorter, "--model-folder", folder)
    path = options.results / "crashdrill.json"
    path.write_text(json.dumps(side_by_side(drills), indent=2) + "\n")


if __name__ == "__main__":
    main()
