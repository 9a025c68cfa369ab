"""Another commit's figures beside this one's: each runs its own copy of a benchmark, in turns.

Both commits are cloned into a temporary folder, and each turn runs the script of one clone and
then that of the other, so that what else the machine does slows both. A figure's ratio is this
commit's median over the other's, of the same turn. Of rates (1/s) and of ratios to somebody else
(x) more is better, of the others less. Figures that only one of the two has are left out.

    python tests/benchmarks/in_turns.py --before COMMIT submissions -- --connections 8
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.checkout import clone
from tests.benchmarks.report import Goal, Report, at_least, at_most, results_option

WORSE = 0.05
"""The share by which a figure may be worse than before."""

Figures = dict[tuple[str, str], float]
"""Medians by name and unit."""


def measured(checkout: Path, script: str, options: Sequence[str]) -> Figures:
    """Run the checkout's own script; the figures that it stored."""
    command = [sys.executable, "-m", f"tests.benchmarks.{script}", *options]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    subprocess.run(command, cwd=checkout, env=environment, check=True)
    stored = checkout / "tests" / "benchmarks" / "results" / f"{script}.json"
    return figures(json.loads(stored.read_text()))


def figures(content: dict[str, Any]) -> Figures:
    """The medians of a stored result, of either form (see ``page.py``)."""
    if "figures" in content:
        return {(row["name"], row["unit"]): row["median"] for row in content["figures"]}
    return {(f"{row['workload']}, {row['dtype']}", "x"): row["ratio"] for row in content["rows"]}


def goal(unit: str) -> Goal:
    """No worse than ``WORSE``, in the direction that the unit says."""
    return at_least(1 - WORSE) if unit in ("1/s", "x") else at_most(1 + WORSE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", required=True, help="the other commit")
    parser.add_argument("--turns", type=int, default=3)
    results_option(parser)
    parser.add_argument("script", help="a benchmark's name")
    parser.add_argument("options", nargs="*", help="for both scripts, after --")
    given = parser.parse_args()
    report = Report(
        benchmark=f"{given.script}_in_turns",
        settings={"before": given.before, "turns": given.turns, "options": " ".join(given.options)},
    )
    before: list[Figures] = []
    now: list[Figures] = []
    with tempfile.TemporaryDirectory(prefix="tinkerapi-bench-") as folder:
        old = clone(Path(folder) / "before", given.before)
        new = clone(Path(folder) / "now", "HEAD")
        for _ in range(given.turns):
            before.append(measured(old, given.script, given.options))
            now.append(measured(new, given.script, given.options))
    for name, unit in (figure for figure in now[0] if figure in before[0]):
        pairs = [(new[name, unit], old[name, unit]) for new, old in zip(now, before, strict=True)]
        medians = [statistics.median(values) for values in zip(*pairs, strict=True)]
        if not min(min(pair) for pair in pairs):
            continue  # a count of failures: nothing to divide
        report.add(
            f"{name} ({medians[1]:.4g} {unit} became {medians[0]:.4g})",
            [new_value / old_value for new_value, old_value in pairs],
            unit="x",
            goal=goal(unit),
        )
    report.finish(given.results)


if __name__ == "__main__":
    main()
