"""The modules that choose experts or weigh them. They are frozen: no adapter is attached to them.

They have few outputs, and what follows is a function of each number. Kernels for few numbers, and
for those that are left over at the end of many, compute them in another way. So on a CPU every
segment's rows are routed by themselves, as if it were alone, and as many that nothing is left over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from training.engine.torch.experts.stacks import ExpertStack
from training.engine.torch.packing.stream import MIN_ROWS, ContextHolder, PassContext, SingleContext
from training.engine.torch.sharding.whole import whole

FEWEST_OUTPUTS = 8
"""Outputs of a product from which on its rows have the same bits among any number of others; a
single one is a sum of another kind."""


def find_routers(model: nn.Module, stacks: Mapping[str, ExpertStack]) -> dict[str, nn.Module]:
    """The routers beside the stacks, and the gates of shared experts, by name."""
    routers = {}
    for stack_name, stack in stacks.items():
        block = stack_name.rpartition(".")[0]
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2:
                below = name.removeprefix(f"{block}.")
                if _routes(below.split("."), len(weight), stack.num_experts):
                    routers[name] = module
    return routers


def _routes(path: list[str], num_outputs: int, num_experts: int) -> bool:
    if num_outputs == num_experts and ("gate" in path or any("router" in part for part in path)):
        return True
    return num_outputs == 1 and path[-1].endswith("gate")  # it weighs a shared expert


def route_by_segment(
    model: nn.Module, routers: Mapping[str, nn.Module], holder: ContextHolder
) -> None:
    """Replace the routers by ones whose results do not depend on batch-mates."""
    for name, module in routers.items():
        if type(module) is nn.Linear and module.out_features == 1:
            model.set_submodule(name, SingleGate(module, holder))
        else:
            model.set_submodule(name, SegmentRouter(module, holder))


class SegmentRouter(nn.Module):
    """A router that is asked once for each segment of a pass."""

    def __init__(self, base: nn.Module, holder: ContextHolder) -> None:
        super().__init__()
        self.base = base
        self.holder = holder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The router's own result: tensors whose rows are those of its only argument."""
        context = self.holder.current
        if context is None or kwargs or len(args) != 1 or args[0].device.type != "cpu":
            return self.base(*args, **kwargs)
        hidden: Tensor = args[0]
        rows = hidden.flatten(0, -2)  # (T, H)
        answers = [self._route(rows[own]) for own in _ranges(context, len(rows))]
        parts = [torch.cat(part) for part in zip(*answers, strict=True)]
        if len(parts) > 1:
            return tuple(parts)
        joined = parts[0]
        return joined.view(*hidden.shape[:-1], -1) if type(self.base) is nn.Linear else joined

    def __getattr__(self, name: str) -> Any:
        """The router's own attributes: some blocks read its weight or bias."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def _route(self, rows: Tensor) -> list[Tensor]:
        """The router's results for some rows, computed as for a multiple of ``MIN_ROWS``."""
        missing = -len(rows) % MIN_ROWS
        if missing:
            filled = torch.cat([rows, rows[-1:].expand(missing, -1)])
            return [result[: len(rows)] for result in self._results(filled)]
        return self._results(rows)

    def _results(self, rows: Tensor) -> list[Tensor]:
        results = self.base(rows)
        return list(results) if isinstance(results, tuple) else [results]


class SingleGate(SegmentRouter):
    """A linear layer of one output, computed as one of several."""

    def __init__(self, base: nn.Linear, holder: ContextHolder) -> None:
        missing = FEWEST_OUTPUTS - base.out_features
        several = nn.Linear(base.in_features, FEWEST_OUTPUTS, bias=False, device="meta")
        weight = pad(whole(base.weight), (0, 0, 0, missing))
        several.weight = nn.Parameter(weight, requires_grad=False)
        several.bias = (
            None
            if base.bias is None
            else nn.Parameter(pad(whole(base.bias), (0, missing)), requires_grad=False)
        )
        super().__init__(several, holder)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., H) -> (..., 1), a column of a larger tensor, whose numbers are not adjacent: a
        function of each is then computed one by one."""
        outputs: Tensor = super().forward(*args, **kwargs)
        return outputs[..., :1]


def _ranges(context: PassContext | SingleContext, num_rows: int) -> Iterator[slice]:
    """The rows of each segment, and those after the last, which pad the pass."""
    if isinstance(context, SingleContext):
        context = context.of(num_rows)
    end = 0
    for segment in context.segments:
        yield segment.rows
        end = segment.end
    if end < num_rows:
        yield slice(end, num_rows)
