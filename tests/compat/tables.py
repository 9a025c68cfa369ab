"""The tables of the manual that scripts write: each stands between two marks that name it."""

from __future__ import annotations

from tests.server import ROOT

DOCS = ROOT / "tinkerapi" / "docs" / "sdk.md"


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"


def read_table(name: str) -> str:
    """The text between the marks."""
    begin, end = _marks(name)
    return DOCS.read_text().split(begin)[1].split(end)[0]


def write_table(name: str, table: str) -> None:
    """Replace what stands between the marks."""
    begin, end = _marks(name)
    before, rest = DOCS.read_text().split(begin)
    DOCS.write_text(before + begin + table + end + rest.split(end)[1])


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of cells, the first of which are the titles."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
