"""A benchmark's report: a table for the reader, and the same figures as JSON.

A figure is a list of measured values; its median, smallest, largest and number are kept. The
machine, the versions and the load during the run are kept with them, because a figure without
them cannot be compared with anything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("django", "django-q2", "granian", "psycopg", "torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The goal for a figure's median."""

    limit: float
    at_most: bool = True

    def is_met(self, median: float) -> bool:
        return median <= self.limit if self.at_most else median >= self.limit

    def __str__(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.limit:g}"


def at_most(limit: float) -> Goal:
    return Goal(limit=limit)


def at_least(limit: float) -> Goal:
    return Goal(limit=limit, at_most=False)


@dataclass(kw_only=True)
class Report:
    """The figures of one run of one benchmark, in the order in which they were added."""

    benchmark: str
    settings: dict[str, Any]
    """The settings of this run."""
    figures: list[dict[str, Any]] = field(default_factory=list)
    load_before: float = field(default_factory=lambda: round(os.getloadavg()[0], 2))

    def add(
        self, name: str, values: Sequence[float], *, unit: str, goal: Goal | None = None
    ) -> None:
        """Keep a figure.

        Args:
            name: What was measured, in words.
            values: One per repetition, at least one.
            unit: Of the values; ``x`` for a ratio.
        """
        median = statistics.median(values)
        self.figures.append(
            {
                "name": name,
                "unit": unit,
                "median": _short(median),
                "min": _short(min(values)),
                "max": _short(max(values)),
                "n": len(values),
                "goal": None if goal is None else str(goal),
                "goal_met": None if goal is None else goal.is_met(median),
            }
        )

    def finish(self, results: Path = RESULTS) -> None:
        """Print the table and write ``<results>/<benchmark>.json``."""
        content = {
            "benchmark": self.benchmark,
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": commit(),
            "machine": asdict(machine()),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in PACKAGES},
            },
            "load": {"before": self.load_before, "after": round(os.getloadavg()[0], 2)},
            "settings": self.settings,
            "figures": self.figures,
        }
        print("\n".join(table(content)))
        results.mkdir(parents=True, exist_ok=True)
        path = results / f"{self.benchmark}.json"
        path.write_text(json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine of the measurement."""

    processor: str
    cores: int
    memory_gib: float
    system: str


def machine() -> Machine:
    """This machine, as far as it tells."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = lines[0].partition(":")[2].strip() if lines else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        processor=processor,
        cores=os.cpu_count() or 1,
        memory_gib=round(memory / 2**30, 1),
        system=f"{platform.system()} {platform.machine()}",
    )


def commit() -> str:
    """The checkout that was measured; empty outside of one."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def table(content: dict[str, Any]) -> list[str]:
    """The figures of a stored result as lines of a Markdown table."""
    lines = [
        "| Figure | Median | Unit | Smallest | Largest | n | Goal |",
        "|---|---|---|---|---|---|---|",
    ]
    for figure in content["figures"]:
        goal = figure["goal"] or ""
        if figure["goal_met"] is not None:
            goal += ": met" if figure["goal_met"] else ": **missed**"
        lines.append(
            f"| {figure['name']} | {figure['median']:g} | {figure['unit']} | {figure['min']:g} "
            f"| {figure['max']:g} | {figure['n']} | {goal} |"
        )
    return lines


def results_option(parser: argparse.ArgumentParser) -> None:
    """``--results``, which every benchmark has."""
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="folder for the JSON file (default: tests/benchmarks/results)",
    )


def _short(value: float) -> float:
    """Four digits: more would be noise."""
    return float(f"{value:.4g}")
