"""The crash drill at its full length, with its table stored.

    python tests/benchmarks/crashdrill.py [--model-folder PATH] [--beyond-one-process]

What it does and what it compares: ``manage.py crashdrill --help``. With a model folder, a second
and shorter drill is made on that base model. ``--beyond-one-process`` drills the tiny model with a
bucket, two workers, two ranks, and a vLLM server instead. That server is the tests' double, which
has vLLM's routes and traps: a real one takes minutes to start after each of its kills.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.report import commit, machine, results_option
from tests.engine.vllm.double_program import double_python
from tests.server import ROOT
from tests.storage.s3_server import KEYS, s3_server


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
        **{f"settings of {name}": content["settings"] for name, content in drills.items()},
        "date": last["date"],
        "versions": last["versions"],
        "machine": asdict(machine()),
        "commit": commit(),
    }


@contextmanager
def bucket() -> Iterator[tuple[object, ...]]:
    """The arguments of a drill whose files are in a bucket of an S3 server of this machine."""
    with s3_server() as server:
        server.make_bucket("drill")
        os.environ |= {**KEYS, "AWS_ENDPOINT_URL": server.url}
        yield "--storage", "s3://drill/files"


@contextmanager
def vllm() -> Iterator[tuple[object, ...]]:
    """The arguments of a drill with the double of a vLLM server."""
    with tempfile.TemporaryDirectory(prefix="tinkerapi-bench-") as folder:
        yield "--vllm-python", double_python(Path(folder) / "python")


BEYOND: dict[str, Callable[[], AbstractContextManager[tuple[object, ...]]]] = {
    "two workers": lambda: nullcontext(("--workers", 2)),
    "a bucket": bucket,
    "two ranks, tp_size": lambda: nullcontext(("--tp-size", 2)),
    "two ranks, fsdp_size": lambda: nullcontext(("--fsdp-size", 2)),
    "a vLLM server (double)": vllm,
}
"""By name of the column."""


def beyond_one_process(path: Path, *, kills: int, names: Sequence[str]) -> None:
    """Drill these, and store the table after each."""
    drills = {}
    for name in names:
        with BEYOND[name]() as arguments:
            drills[name] = drill("--kills", kills, "--adapters", 4, *arguments)
        path.write_text(json.dumps(side_by_side(drills), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="manage.py crashdrill, with its table stored")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--model-folder", type=Path, help="of a second drill's base model")
    parser.add_argument("--model-kills", type=int, default=30)
    parser.add_argument("--beyond-one-process", nargs="*", choices=BEYOND, metavar="NAME")
    results_option(parser)
    options = parser.parse_args()
    if options.beyond_one_process is not None:
        beyond_one_process(
            options.results / "crashdrill_beyond_one_process.json",
            kills=options.kills,
            names=options.beyond_one_process or list(BEYOND),
        )
        return
    drills = {"tiny model": drill("--kills", options.kills)}
    if options.model_folder is not None:
        folder = options.model_folder.resolve()
        shorter = ("--kills", options.model_kills, "--steps", 12, "--adapters", 4)
        drills[folder.name] = drill(*shorter, "--model-folder", folder)
    path = options.results / "crashdrill.json"
    path.write_text(json.dumps(side_by_side(drills), indent=2) + "\n")


if __name__ == "__main__":
    main()
