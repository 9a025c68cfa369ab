"""The crash drill at its full length, with its table stored.

    python tests/benchmarks/crashdrill.py

What it does and what it compares: ``manage.py crashdrill --help``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.report import commit, machine, results_option
from tests.server import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(description="manage.py crashdrill, with its table stored")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model-folder", type=Path, help="default: a tiny model")
    parser.add_argument("--name", default="crashdrill", help="of the result")
    results_option(parser)
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="tinkerapi-bench-") as folder:
        result = Path(folder) / "drill.json"
        command = [sys.executable, "manage.py", "crashdrill", "--json", str(result), *more]
        command += ["--kills", str(options.kills), "--seed", str(options.seed)]
        if options.model_folder:
            command += ["--model-folder", str(options.model_folder.resolve())]
        done = subprocess.run(command, cwd=ROOT, check=False)
        content = json.loads(result.read_text()) if result.exists() else None
    if content is not None:
        content |= {"machine": asdict(machine()), "commit": commit()}
        path = options.results / f"{options.name}.json"
        path.write_text(json.dumps(content, indent=2) + "\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
