"""The ranks of a worker over several devices, and how they exchange tensors and small values.

Every rank runs the same operations in the same order. Tensors of a pass go over the devices' own
backend; the leader's small values over gloo, on which a lost rank ends the wait of the others
(NCCL would wait on).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from training.base_model_config import BaseModelConfig

Value = TypeVar("Value")

LONGEST_WAIT = timedelta(days=365)
"""For the leader's next operation: a worker may be idle for long, and the leader reads the whole
model first."""


class GroupBroken(Exception):
    """A rank has another result or does not answer, so none can be trusted; the worker must end."""


class RankGroup:
    """This process's place among the ranks over which its base model is sharded."""

    def __init__(self, *, rank: int, config: BaseModelConfig, control: Any) -> None:
        """
        Args:
            config: Of the base model; says how it is sharded.
            control: torch's process group for small values.
        """
        self.rank = rank
        self.sizes = config
        """Of its sharding: ``tp_size`` and so on."""
        self.size = config.num_ranks
        self.splits_layers = config.tp_size > 1
        """Whether each layer is split among the ranks, which compute the same rows; otherwise each
        rank computes other sequences, with whole layers, of which it holds a part."""
        self.splits_experts = config.ep_size > 1
        """Whether each rank has some of the experts, and not a part of each."""
        self._control = control

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the ranks, which has the same bits on all; return it."""
        dist.all_reduce(tensor)
        return tensor

    def least(self, number: int) -> int:
        """The least of the ranks' numbers."""
        numbers = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(numbers, dist.ReduceOp.MIN, group=self._control)
        return int(numbers)

    def least_of(self, measure: Callable[[torch.device], int]) -> Callable[[torch.device], int]:
        """A function of a device that is the least of the ranks' own results."""
        return lambda device: self.least(measure(device))

    def of_first(self, make: Callable[[], Value]) -> Value:
        """The first rank's value; the others do not call ``make``."""
        values = [make() if self.is_first else None]
        dist.broadcast_object_list(values, src=0, group=self._control)
        value: Any = values[0]
        return value  # type: ignore[no-any-return]

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def require_equal(self, what: str, value: object) -> None:
        """Compare a small result of an operation.

        Raises:
            GroupBroken: It differs between ranks.
        """
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise GroupBroken(f"{what} differs between the ranks: {values}")


def is_broken_exchange(error: BaseException) -> bool:
    """Whether an error, or one that led to it, is of an exchange with another rank."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, GroupBroken | dist.DistError):
            return True
        if isinstance(seen, RuntimeError) and re.search("gloo|nccl", str(seen), re.IGNORECASE):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def join_group(
    config: BaseModelConfig, *, rank: int, device: str, meeting_place: Path, wait_seconds: float
) -> RankGroup:
    """Wait for the other ranks.

    Args:
        config: Of the base model.
        device: This rank's: ``cpu`` or ``cuda:N``.
        meeting_place: A file of the group in a private folder; it need not exist.
        wait_seconds: Longest wait of the first rank for another one, here and in each exchange. The
            others wait for the first one without end, and end with it.

    Raises:
        RuntimeError: torch's own: the first rank has waited so long.
    """
    is_cpu = device == "cpu"
    # transformers reads these for its own meshes: a rank's device is its number there.
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(config.num_ranks),
        "LOCAL_RANK": str(rank) if is_cpu else device.removeprefix("cuda:"),
    }
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    longest = timedelta(seconds=wait_seconds) if rank == 0 else LONGEST_WAIT
    dist.init_process_group(
        "gloo" if is_cpu else "cpu:gloo,cuda:nccl",
        init_method=f"file://{meeting_place}",
        rank=rank,
        world_size=config.num_ranks,
        timeout=longest,
    )
    control = dist.new_group(backend="gloo", timeout=longest)
    return RankGroup(rank=rank, config=config, control=control)


class _AddUpGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.add_up(grad.clone(memory_format=torch.contiguous_format)), None


class _AddUpOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup) -> Tensor:
        return group.add_up(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def add_up_gradients(x: Tensor, group: RankGroup) -> Tensor:
    """``x`` itself; its gradient is the sum of those of the ranks, each of which computes a part of
    what is made of it."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    output: Tensor = _AddUpGradients.apply(x, group)  # type: ignore[no-untyped-call]
    return output


def add_up_outputs(x: Tensor, group: RankGroup) -> Tensor:
    """The sum of the ranks' tensors, each a part of the result."""
    output: Tensor = _AddUpOutputs.apply(x, group)  # type: ignore[no-untyped-call]
    return output
