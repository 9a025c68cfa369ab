"""The gradients of a pass, added up by adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from training.engine.torch.adapters import Adapter, AdapterTensors
from training.engine.torch.base_model import BaseModel
from training.engine.torch.packing.plan import PlannedJob
from training.engine.torch.sharding.rank_group import RankGroup


class GradientSums:
    """Each adapter's accumulated gradient with the pass's added, part by part, in their order.

    The adapters keep theirs: a pass that fails is dropped.
    """

    def __init__(
        self,
        jobs: Iterable[PlannedJob],
        adapters: Mapping[str, Adapter],
        group: RankGroup | None,
    ) -> None:
        """``jobs``: those that train."""
        self._adapters = adapters
        self._sums: dict[str, AdapterTensors] = {}
        self._by_part: dict[tuple[str, int], AdapterTensors] | None = None
        if group is not None:
            # Over several ranks each part is summed over them first, whatever shares the pass, and
            # also by a rank that has none of its datums.
            parts = dict.fromkeys(planned.part for planned in jobs)
            self._by_part = {part: _zeros_like(adapters[part[0]].grad) for part in parts}

    def add(self, part: tuple[str, int], grad: AdapterTensors) -> None:
        """Add a gradient of a part of a micro-batch, whose buffer may be overwritten."""
        if self._by_part is not None:
            self._by_part[part].flat.add_(grad.flat)
        else:
            self._add_to_adapter(part[0], grad)

    def finish(self, base_model: BaseModel) -> dict[str, AdapterTensors]:
        """The sums by the names of the adapters; over several ranks, those of all."""
        group = base_model.group
        if group is not None and self._by_part is not None:
            has_share = group.splits_layers or base_model.divides_passes
            for (name, _), own in self._by_part.items():
                if not has_share and not group.is_first:
                    own.flat.zero_()  # each rank has computed all of it
                group.add_up(own.flat)
                self._add_to_adapter(name, own)
        return self._sums

    def _add_to_adapter(self, name: str, grad: AdapterTensors) -> None:
        before = self._sums.get(name)
        if before is not None:
            before.flat.add_(grad.flat)
        else:
            grad.flat.add_(self._adapters[name].grad.flat)
            self._sums[name] = grad


def _zeros_like(tensors: AdapterTensors) -> AdapterTensors:
    return AdapterTensors(tensors.layout, torch.zeros_like(tensors.flat))
