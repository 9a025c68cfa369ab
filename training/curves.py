"""The curves of one run: its optimizer steps, its samples, and its client's own metrics.

Everything is read from summaries and small rows, never from a payload or a result. The cost does
not grow with the run: of a long run, windows of consecutive requests at equal distances are read,
and each window becomes one point.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

import orjson

from futures.database import execute
from training.kinds import Kind
from training.models import ClientMetrics, Run
from training.pass_figures import FIGURES

MAX_REQUESTS = 6_000
"""Requests that are read for one curve."""
MAX_POINTS = 600
MAX_WINDOW = 600
"""Requests in one window; a step of more requests is judged by a part of them."""
MAX_METRICS = 100
"""Names of client metrics that are drawn, in alphabetical order."""

Numbers = list[float | None]

OF_TOKENS = ("ratio_mean", "clip_share", "kl_k1", "kl_k3", "drift_mean", "entropy")
"""Figures that are means over sampled tokens."""
LARGEST = ("drift_max",)
"""Figures of which a step, or several steps as one point, show the largest."""
OF_SEQUENCES = ("advantage_mean", "advantage_zero_share", "sampled_length")
COLUMNS = ("loss", "grad_norm", "learning_rate", "tokens_per_second", *FIGURES)

_WINDOWS = """
SELECT f.seq_id, f.kind, f.summary::text, extract(epoch FROM f.finished_at)::float8, w.first
FROM generate_series(%(first)s::bigint, %(last)s::bigint, %(stride)s::bigint) AS w (first)
CROSS JOIN LATERAL (
    SELECT seq_id, kind, summary, finished_at FROM futures_future
    WHERE lane_id = %(run_id)s AND seq_id >= w.first
        AND seq_id < w.first + %(width)s AND seq_id <= %(last)s
        AND state = 'ready' AND kind = ANY (%(kinds)s)
    LIMIT %(width)s  -- all of them; without it, the planner compares each request with each window
) AS f
ORDER BY f.seq_id
"""

_METRICS = """
SELECT step, extract(epoch FROM created_at)::float8, metrics::text FROM (
    SELECT *, row_number() OVER (ORDER BY step DESC) - 1 AS place, count(*) OVER () AS number
    FROM training_clientmetrics WHERE run_id = %(run_id)s AND step >= %(from_step)s
) AS m
WHERE place %% greatest(1, (number + %(points)s - 1) / %(points)s) = 0
ORDER BY step
"""

_SAMPLED = """
SELECT step, tokens::float8 / greatest(sequences, 1),
    stopped_by_length::float8 / greatest(sequences, 1), -logprob_sum / greatest(tokens, 1)
FROM (
    SELECT *, row_number() OVER (ORDER BY step DESC) - 1 AS place, count(*) OVER () AS number
    FROM training_sampledstep WHERE run_id = %(run_id)s AND step >= %(from_step)s
) AS s
WHERE place %% greatest(1, (number + %(points)s - 1) / %(points)s) = 0
ORDER BY step
"""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The optimizer steps of a run, oldest first; all lists have one entry for each point."""

    steps: list[int] = field(default_factory=list)
    seq_ids: list[int] = field(default_factory=list)
    """Of the last optim_step of each point."""
    times: Numbers = field(default_factory=list)
    """When it finished, in seconds since 1970."""
    tokens: Numbers = field(default_factory=list)
    """Tokens that the run was trained on until then."""
    columns: Mapping[str, Numbers] = field(default_factory=dict)
    """``COLUMNS`` that have any number."""
    loss_fns: Sequence[str] = ()
    """Names of the passes' losses, other than cross_entropy."""
    is_thinned: bool = False
    """Whether steps were left out between the points."""


@dataclass(kw_only=True)
class _Point:
    step: int
    seq_id: int
    time: float
    tokens: float | None
    values: dict[str, float | None]


def run_curves(run: Run, *, after: int = 0, until: int | None = None) -> Curves:
    """The steps of a run in a range of its requests; one query.

    Args:
        after: Points after this request, as an earlier answer's ``seq_ids`` has it.
        until: The last request; None for the newest finished one.
    """
    first = max(after, 1)
    last = run.applied_seq_id if until is None else min(until, run.applied_seq_id)
    span = last - first + 1
    if span <= 0:
        return Curves()
    is_thinned = span > MAX_REQUESTS
    width, stride = _windows(span, run) if is_thinned else (span, span)
    rows = _read(run, first=first, last=last, stride=stride, width=width)
    loss_fns = {row[2].get("loss_fn"): None for row in rows if row[1] == Kind.FORWARD_BACKWARD}
    points: list[_Point] = []
    for _, window in groupby(rows, key=itemgetter(-1)):
        of_window = _points(list(window))
        points += [_mean(of_window)] if is_thinned and of_window else of_window
    points = [point for point in points if point.seq_id > after]
    if not is_thinned:
        size = math.ceil(len(points) / MAX_POINTS) if points else 1
        points = [_mean(points[at : at + size]) for at in range(0, len(points), size)]
    return _curves(points, [name for name in loss_fns if name], is_thinned=is_thinned)


def client_curves(run: Run, *, from_step: int = 0) -> dict[str, Any]:
    """The client's own metrics: ``steps``, ``times`` and ``values`` by name; one query.

    Args:
        from_step: The first step. Metrics may be added to steps that were read before.
    """
    asked = {"run_id": run.pk, "from_step": from_step, "points": MAX_POINTS}
    found = execute(_METRICS, asked)
    rows = [(step, time, orjson.loads(text)) for step, time, text in found]
    names = sorted({name for _, _, metrics in rows for name in metrics})
    return {
        "steps": [step for step, _, _ in rows],
        "times": [time for _, time, _ in rows],
        "values": [
            [name, [_number(metrics.get(name)) for _, _, metrics in rows]]
            for name in names[:MAX_METRICS]
        ],
        "more_names": max(0, len(names) - MAX_METRICS),
    }


def sampled_curves(run: Run, *, from_step: int = 0) -> dict[str, Any]:
    """What was sampled from each step's weights: mean length, share of sequences stopped by
    length, entropy for each token; one query."""
    asked = {"run_id": run.pk, "from_step": from_step, "points": MAX_POINTS}
    rows = execute(_SAMPLED, asked)
    names = ("steps", "length", "length_share", "entropy")
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    return {name: list(column) for name, column in zip(names, columns, strict=True)}


def _windows(span: int, run: Run) -> tuple[int, int]:
    """Width and distance of the windows: each has two steps or more, if steps are short."""
    requests_per_step = run.applied_seq_id / max(run.step, 1)
    width = min(math.ceil(2 * requests_per_step) + 1, MAX_WINDOW)
    number = max(1, min(MAX_POINTS, MAX_REQUESTS // width))
    return width, math.ceil(span / number)


def _read(run: Run, *, first: int, last: int, stride: int, width: int) -> list[tuple[Any, ...]]:
    """Passes and steps of a run in windows of their numbers; the last column says which window."""
    asked = {"first": first, "last": last, "stride": stride, "width": width}
    kinds = [str(Kind.FORWARD_BACKWARD), str(Kind.OPTIM_STEP)]
    rows = execute(_WINDOWS, {**asked, "run_id": run.pk, "kinds": kinds})
    return [(number, kind, orjson.loads(text), *more) for number, kind, text, *more in rows]


def _points(rows: Sequence[tuple[Any, ...]]) -> list[_Point]:
    """One point for each optim_step of consecutive requests."""
    points: list[_Point] = []
    passes: list[Mapping[str, Any]] = []
    last: _Point | None = None
    for seq_id, kind, summary, time, _ in rows:
        if kind == Kind.FORWARD_BACKWARD:
            passes.append(summary)
            continue
        tokens = _number(summary.get("run_tokens"))
        values = _step_figures(passes) | {
            "grad_norm": _number(summary.get("grad_norm")),
            "learning_rate": _number(summary.get("learning_rate")),
            "tokens_per_second": _throughput(last, tokens, time),
        }
        step = int(_number(summary.get("step")) or 0)
        last = _Point(step=step, seq_id=seq_id, time=time, tokens=tokens, values=values)
        points.append(last)
        passes = []
    return points


def _throughput(last: _Point | None, tokens: float | None, time: float) -> float | None:
    """Tokens per second since the step before, waiting for the client included."""
    if last is None or last.tokens is None or tokens is None or time <= last.time:
        return None
    return (tokens - last.tokens) / (time - last.time)


def _step_figures(passes: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The figures of one step from those of its passes."""
    figures: dict[str, float | None] = {
        "loss": _weighted(passes, "loss", "trained_tokens", or_else="tokens"),
        "advantage_std": _pooled_std(passes),
    }
    figures |= {name: _weighted(passes, name, "sampled_tokens") for name in OF_TOKENS}
    figures |= {name: _weighted(passes, name, "sequences") for name in OF_SEQUENCES}
    for name in LARGEST:
        figures[name] = max(
            (n for of in passes if (n := _number(of.get(name))) is not None), default=None
        )
    for name in ("sampled_tokens", "sequences"):
        counts = [number for of in passes if (number := _number(of.get(name))) is not None]
        figures[name] = sum(counts) if counts else None
    return figures


def _weighted(
    passes: Iterable[Mapping[str, Any]], name: str, weight: str, *, or_else: str = ""
) -> float | None:
    """The mean of a figure over the passes that have it, by their number of ``weight``."""
    total = weights = 0.0
    for summary in passes:
        value = _number(summary.get(name))
        if value is not None:
            by = _number(summary.get(weight)) or _number(summary.get(or_else)) or 1.0
            total, weights = total + value * by, weights + by
    return total / weights if weights else None


def _pooled_std(passes: Sequence[Mapping[str, Any]]) -> float | None:
    """The standard deviation over the sequences of all passes."""
    mean = _weighted(passes, "advantage_mean", "sequences")
    if mean is None:
        return None
    squares = [
        {
            "square": (_number(of.get("advantage_std")) or 0.0) ** 2
            + (_number(of.get("advantage_mean")) or 0.0) ** 2,
            "sequences": of.get("sequences"),
        }
        for of in passes
        if _number(of.get("advantage_mean")) is not None
    ]
    square = _weighted(squares, "square", "sequences")
    return None if square is None else math.sqrt(max(square - mean**2, 0.0))


def _mean(points: Sequence[_Point]) -> _Point:
    """Neighbouring points as one, at the place of the last."""
    if len(points) == 1:
        return points[0]
    last = points[-1]
    values: dict[str, float | None] = {}
    for name in last.values:
        known = [value for point in points if (value := point.values.get(name)) is not None]
        if name in LARGEST:
            values[name] = max(known, default=None)
        else:
            values[name] = sum(known) / len(known) if known else None
    return _Point(
        step=last.step, seq_id=last.seq_id, time=last.time, tokens=last.tokens, values=values
    )


def _curves(points: Sequence[_Point], loss_fns: Sequence[str], *, is_thinned: bool) -> Curves:
    columns = {name: [_number(point.values.get(name)) for point in points] for name in COLUMNS}
    return Curves(
        steps=[point.step for point in points],
        seq_ids=[point.seq_id for point in points],
        times=[point.time for point in points],
        tokens=[point.tokens for point in points],
        columns={
            name: values
            for name, values in columns.items()
            if any(value is not None for value in values)
        },
        loss_fns=loss_fns,
        is_thinned=is_thinned,
    )


def _number(value: Any) -> float | None:
    """A finite number, or None for any other value."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def run_steps(run: Run) -> Iterator[dict[str, Any]]:
    """All steps of a run, none left out: ``step``, ``time``, ``tokens`` and ``COLUMNS``, as a
    download; some thousand requests are read at a time."""
    after, reach = 0, MAX_REQUESTS
    while after < run.applied_seq_id:
        until = min(after + reach, run.applied_seq_id)
        rows = _read(run, first=max(after, 1), last=until, stride=reach + 1, width=reach + 1)
        points = [point for point in _points(rows) if point.seq_id > after]
        if not points:  # a step of very many passes
            if until == run.applied_seq_id:
                return
            reach *= 2
            continue
        for point in points:
            yield {
                "step": point.step,
                "time": point.time,
                "tokens": point.tokens,
                **{name: _number(point.values.get(name)) for name in COLUMNS},
            }
        after, reach = points[-1].seq_id, MAX_REQUESTS


def client_metric_steps(run: Run) -> Iterator[tuple[int, float, dict[str, Any]]]:
    """All steps with client metrics: step, time, name to number; in the order of the steps."""
    rows = ClientMetrics.objects.filter(run=run).order_by("step")
    for step, created_at, metrics in rows.values_list("step", "created_at", "metrics").iterator():
        yield step, created_at.timestamp(), metrics


def client_metric_names(run: Run) -> list[str]:
    """The names of a run's client metrics, in alphabetical order."""
    sql = """
        SELECT DISTINCT jsonb_object_keys(metrics) AS name FROM training_clientmetrics
        WHERE run_id = %(run_id)s ORDER BY name LIMIT 1000
    """
    return [name for (name,) in execute(sql, {"run_id": run.pk})]
