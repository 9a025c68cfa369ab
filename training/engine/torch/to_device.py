"""Copies of the host's numbers on a model's device, for which the host does not wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(
    numbers: Tensor | NDArray[Any] | Sequence[Any],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A tensor of these numbers on the device.

    On a GPU the copy is ordered among the operations of the current stream and begins in pinned
    memory, so that the host goes on at once. A copy from ordinary memory would make it wait until
    the device has done all that was asked before. On a CPU an array or a tensor is not copied,
    nor is on a GPU what is there already.

    Args:
        dtype: None takes that of the numbers.
    """
    here = torch.as_tensor(numbers, dtype=dtype)
    if device.type == "cpu" or here.device == device:
        return here
    if here.numel() == 0:
        return here.new_empty(here.shape, device=device)
    return here.pin_memory().to(device, non_blocking=True)
