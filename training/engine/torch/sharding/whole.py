"""The whole of a parameter that transformers may have sharded."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(parameter: Tensor) -> Tensor:
    """The parameter as a plain tensor; of a sharded one a copy that all ranks make together."""
    if isinstance(parameter, DTensor):
        full: Tensor = parameter.full_tensor()
        return full.detach().clone()
    return parameter
