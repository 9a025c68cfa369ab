"""Writes the stored figures into ``tinkerapi/docs/benchmarks.md``.

Everything between ``<!-- figures: NAME -->`` and the next ``<!-- end -->`` is made from
``results/NAME.json``; a test fails when page and results differ.

    python tests/benchmarks/page.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.report import RESULTS, table
from tests.server import ROOT

PAGE = ROOT / "tinkerapi" / "docs" / "benchmarks.md"
_BLOCK = re.compile(r"<!-- figures: (\w+) -->\n.*?<!-- end -->", flags=re.DOTALL)


def with_figures(page: str) -> str:
    """The page with the figures that are stored now."""
    return _BLOCK.sub(lambda block: _block(block[1]), page)


def names(page: str) -> set[str]:
    """The benchmarks whose figures the page shows."""
    return {block[1] for block in _BLOCK.finditer(page)}


def _block(name: str) -> str:
    path = RESULTS / f"{name}.json"
    lines = ["*Not measured yet.*"]
    if path.exists():
        content = json.loads(path.read_text())
        lines = _measured(content) if "figures" in content else _rows(content)
    return "\n".join([f"<!-- figures: {name} -->", *lines, "<!-- end -->"])


def _measured(content: dict[str, Any]) -> list[str]:
    """A result that ``report`` wrote."""
    machine, load = content["machine"], content["load"]
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    settings = ", ".join(f"{name} {value}" for name, value in content["settings"].items())
    return [
        *table(content),
        "",
        f"Measured {content['date']} at commit {content['commit']} on {machine['cores']} cores "
        f"({machine['processor']}), {machine['memory_gib']:g} GiB; load before "
        f"{load['before']:g}, after {load['after']:g}. {settings}. {versions}.",
    ]


def _rows(content: dict[str, Any]) -> list[str]:
    """A result that is a list of rows with equal columns, and some facts beside it."""
    rows = content["rows"]
    facts = [f"{name}: {_fact(value)}" for name, value in content.items() if name != "rows"]
    return [
        "| " + " | ".join(name.replace("_", " ") for name in rows[0]) + " |",
        "|" + "---|" * len(rows[0]),
        *("| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in rows),
        "",
        *(f"- {fact}" for fact in facts),
    ]


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return str(value)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    PAGE.write_text(with_figures(PAGE.read_text()))


if __name__ == "__main__":
    main()
