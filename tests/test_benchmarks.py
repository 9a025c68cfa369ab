"""The page of figures equals the stored results, and has all of them."""

from __future__ import annotations

import pytest

from tests.benchmarks.page import PAGE, names, with_figures
from tests.benchmarks.report import RESULTS, Report, at_least, at_most


def test_the_page_shows_the_stored_figures() -> None:
    page = PAGE.read_text()
    assert with_figures(page) == page, "run python tests/benchmarks/page.py"


def test_every_stored_result_is_on_the_page_and_has_a_script() -> None:
    stored = {path.stem for path in RESULTS.glob("*.json")}
    scripts = {path.stem for path in RESULTS.parent.glob("*.py")}
    assert stored
    assert stored <= names(PAGE.read_text()) <= scripts | {f"{name}_in_turns" for name in scripts}


@pytest.mark.parametrize(
    ("values", "goal", "met"),
    [
        ([1.0, 9.0, 3.0], at_most(3.0), True),
        ([1.0, 9.0, 3.1], at_most(3.0), False),
        ([1.0, 9.0, 3.0], at_least(3.0), True),
        ([1.0, 9.0, 2.9], at_least(3.0), False),
    ],
)
def test_a_goal_is_about_the_median(values: list[float], goal: object, met: bool) -> None:
    report = Report(benchmark="test", settings={})
    report.add("figure", values, unit="s", goal=goal)  # type: ignore[arg-type]  # parametrized
    assert report.figures[0]["goal_met"] is met
    assert report.figures[0]["n"] == 3
    assert (report.figures[0]["min"], report.figures[0]["max"]) == (1.0, 9.0)
