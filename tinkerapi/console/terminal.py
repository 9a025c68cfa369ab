"""Runs as lines of text, for ``manage.py watch``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from futures.overview import lane_waiting
from tinkerapi.console.kit.display import moment_text
from tinkerapi.console.pages.run_status import sentence
from training.curves import Curves
from training.progress import steps_newest

BARS = "▁▂▃▄▅▆▇█"
SPARK_POINTS = 60
NAMED = (
    ("loss", "loss"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_second", "tokens/s"),
    ("kl_k3", "KL"),
    ("entropy", "entropy"),
)
"""Columns of a run's curves that are shown, with their names."""

PACE_STEPS = 20


def overview_lines(runs: Sequence[Any]) -> list[str]:
    """A table of runs, read by ``training.overview.runs_newest``."""
    if not runs:
        return ["There are no runs yet; GET / in a browser says how to begin."]
    rows = [["run", "owner", "steps", "loss", "reward", "last request"]]
    for run in runs:
        rows.append(
            [
                printable(run.shown_title),
                printable(run.owner.get_username()),
                f"{run.step:,}",
                _short(run.last_loss),
                _short(run.last_reward),
                moment_text(run.newest_request_at),
            ]
        )
    widths = [min(max(map(len, column)), 40) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell[:width].ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


def run_lines(run: Any, state: str, curves: Curves, metrics: Mapping[str, Any]) -> list[str]:
    """A run's sentence, and for each curve its form, first and last number.

    Args:
        run: Read by ``with_progress`` and ``with_activity``.
        metrics: What ``training.curves.client_curves`` returns.
    """
    steps = steps_newest(run, limit=PACE_STEPS)
    said = sentence(run, state, steps, lane_waiting(run.pk))
    named = [(name, curves.columns[column]) for column, name in NAMED if column in curves.columns]
    named += [(name, values) for name, values in metrics["values"]]
    lines = [f"{printable(run.shown_title)}  ({run.pk})", printable(said)]
    for name, values in named:
        known = [value for value in values if value is not None]
        if known:
            figures = f"{known[0]:.4g} -> {known[-1]:.4g}"
            lines.append(f"{printable(name)[:20]:20}  {sparkline(known)}  {figures}")
    return lines


def step_line(curves: Curves, place: int, metrics: Mapping[str, Any]) -> str:
    """One step with its numbers, and its client's own."""
    step = curves.steps[place]
    parts = [f"step {step}"]
    for column, name in NAMED:
        values = curves.columns.get(column)
        if values is not None and values[place] is not None:
            parts.append(f"{name} {values[place]:.4g}")
    if step in metrics["steps"]:
        at = metrics["steps"].index(step)
        parts += [
            f"{printable(name)} {values[at]:.4g}"
            for name, values in metrics["values"]
            if values[at] is not None
        ]
    return "  ".join(parts)


def sparkline(values: Sequence[float]) -> str:
    """The form of a curve: at most ``SPARK_POINTS`` characters, each the mean of its values."""
    largest = max(map(abs, values)) or 1.0
    shares = [value / largest for value in values]  # sums and differences are finite
    number = min(len(values), SPARK_POINTS)
    groups = [
        shares[len(shares) * at // number : len(shares) * (at + 1) // number]
        for at in range(number)
    ]
    means = [sum(group) / len(group) for group in groups]
    low, high = min(means), max(means)
    span = high - low
    return "".join(
        BARS[round((mean - low) / span * (len(BARS) - 1)) if span else 0] for mean in means
    )


def printable(text: str) -> str:
    """Text of a client without characters that move a terminal's cursor."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _short(number: str | None) -> str:
    try:
        return f"{float(number):.4g}" if number is not None else "-"
    except ValueError:
        return "-"
