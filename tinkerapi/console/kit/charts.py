"""The data of the charts that unfold draws, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence


def line_chart(labels: Sequence[object], values: Sequence[float | None], *, name: str) -> str:
    """The data of unfold's line chart, as JSON; None leaves a gap, and one value is a point."""
    return _chart(
        labels,
        [
            {
                "label": name,
                "data": [None if value is None else float(f"{value:.4g}") for value in values],
                "borderColor": "var(--color-primary-500)",
                "backgroundColor": "var(--color-primary-500)",
                "spanGaps": True,
                "pointStyle": "circle" if len(values) - list(values).count(None) == 1 else False,
            }
        ],
    )


def bar_chart(labels: Sequence[object], bars: Mapping[str, tuple[Sequence[int], str]]) -> str:
    """The data of unfold's bar chart, as JSON: name to values and CSS colour, stacked."""
    return _chart(
        labels,
        [
            {
                "label": name,
                "data": [value or None for value in values],  # a zero would still draw its border
                "backgroundColor": colour,
                "borderRadius": 0,
                "stack": "all",
                "maxBarThickness": 16,
            }
            for name, (values, colour) in bars.items()
        ],
    )


def _chart(labels: Sequence[object], datasets: Sequence[Mapping[str, object]]) -> str:
    axis = {"displayYAxis": True, "maxTicksXLimit": 12}
    return json.dumps(
        {"labels": list(labels), "datasets": [{**dataset, **axis} for dataset in datasets]}
    )
