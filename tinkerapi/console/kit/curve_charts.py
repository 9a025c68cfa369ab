"""The charts of a run's page: which curve is in which chart, under which words.

The browser draws them (``static/tinkerapi/curves.js``) from the columns of ``training.curves``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart, drawn if any of its columns has a number."""

    title: str
    note: str
    """What the numbers are, in a few words."""
    columns: Sequence[tuple[str, str]]
    """Column and its name in the legend."""
    source: str = "own"
    """``own``: optimizer steps; ``sampled``: what was sampled from each step."""
    band: str = ""
    """A column that is drawn as a band of this width around the first one."""
    percent: bool = False
    may_be_log: bool = False
    """Whether the button for logarithmic axes applies."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ChartGroup:
    """Charts under one heading."""

    title: str
    charts: Sequence[Chart] = field(default_factory=tuple)

    def as_json(self) -> dict[str, Any]:
        return {"title": self.title, "charts": [chart.as_json() for chart in self.charts]}


def chart_groups(loss_fns: Sequence[str]) -> list[ChartGroup]:
    """All charts of a run.

    Args:
        loss_fns: Its losses other than cross_entropy, whose values are not nats.
    """
    unit = f"{', '.join(loss_fns)}, per trained token" if loss_fns else "nats per token"
    return [
        ChartGroup(
            title="Training",
            charts=[
                Chart(title="Loss", note=unit, columns=[("loss", "loss")], may_be_log=not loss_fns),
                Chart(
                    title="Gradient norm",
                    note="before clipping",
                    columns=[("grad_norm", "norm")],
                    may_be_log=True,
                ),
                Chart(
                    title="Learning rate",
                    note="of each step",
                    columns=[("learning_rate", "rate")],
                    may_be_log=True,
                ),
                Chart(
                    title="Throughput",
                    note="trained tokens per second, waiting included",
                    columns=[("tokens_per_second", "tokens/s")],
                ),
            ],
        ),
        ChartGroup(
            title="Policy",
            charts=[
                Chart(
                    title="Advantage",
                    note="mean over sequences, and one standard deviation around it",
                    columns=[("advantage_mean", "mean")],
                    band="advantage_std",
                ),
                Chart(
                    title="Zero advantage",
                    note="share of sequences that teach nothing",
                    columns=[("advantage_zero_share", "share")],
                    percent=True,
                ),
                Chart(
                    title="KL of sampler to trainer",
                    note="two estimates, nats per token",
                    columns=[("kl_k3", "k3"), ("kl_k1", "k1")],
                ),
                Chart(
                    title="Drift of sampler and trainer",
                    note="difference of their log-probabilities of a sampled token, nats",
                    columns=[("drift_mean", "mean"), ("drift_max", "largest")],
                    may_be_log=True,
                ),
                Chart(
                    title="Ratio",
                    note="trainer's by sampler's probability, mean over sampled tokens",
                    columns=[("ratio_mean", "mean")],
                ),
                Chart(
                    title="Clipped",
                    note="share of sampled tokens outside the thresholds",
                    columns=[("clip_share", "share")],
                    percent=True,
                ),
                Chart(
                    title="Entropy",
                    note="of the sampler, nats per token",
                    columns=[("entropy", "entropy")],
                ),
                Chart(
                    title="Trained length",
                    note="sampled tokens in a sequence, mean",
                    columns=[("sampled_length", "tokens")],
                ),
            ],
        ),
        ChartGroup(
            title="Samples",
            charts=[
                Chart(
                    title="Completion length",
                    note="tokens, mean over what was sampled from each step",
                    columns=[("length", "tokens")],
                    source="sampled",
                ),
                Chart(
                    title="Stopped by length",
                    note="share of completions that met the token limit",
                    columns=[("length_share", "share")],
                    source="sampled",
                    percent=True,
                ),
            ],
        ),
    ]
