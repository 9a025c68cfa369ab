"""Clients' own losses in a group of ranks that all compute the same datums.

Their time is limited, so two ranks might decide differently. The first rank runs them, in its own
process for that, and the others take its results.
"""

from __future__ import annotations

from collections.abc import Sequence

from training.custom_loss_graph import CustomLossGraph
from training.engine.custom_loss.run import CustomLossInputs, CustomLossRunner, Outcome, Work
from training.engine.torch.sharding.rank_group import RankGroup


class SharedCustomLosses:
    """A ``CustomLossRunner`` that runs on the first rank only."""

    def __init__(self, inner: CustomLossRunner, group: RankGroup) -> None:
        self._inner = inner
        self._group = group

    def __call__(
        self, graph: CustomLossGraph, data: Sequence[CustomLossInputs], work: Work
    ) -> list[Outcome]:
        return self._group.of_first(lambda: self._inner(graph, data, work))

    def prepare(self) -> bool:
        return self._inner.prepare()

    def release(self) -> None:
        self._inner.release()
