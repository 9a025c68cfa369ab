"""Products of rows with a frozen matrix of the base model, forwards and backwards.

In float32 on an x86 CPU they go to oneDNN, as torch's own bfloat16 products do, and not to the BLAS
behind ``torch.mm``. oneDNN reads the matrix where it lies instead of copying it for every product,
which matters most for few rows. Its results for a row do not depend on the number of rows from two
on, on the row's place, or on the number of threads (measured with AVX2 and AVX-512, one to four
threads); those of one row alone do, so a second is added.
"""

from __future__ import annotations

import platform
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from training.engine.torch.thread_team import ROWS_MULTIPLE, ThreadTeam, cut

PART_NUMBERS = 2**21
"""Fewest numbers of a part of a matrix: reading them takes about a millisecond, and handing the
part to another thread a tenth of that."""


def times_transposed(
    rows: Tensor, weight: Tensor, bias: Tensor | None = None, *, team: ThreadTeam | None = None
) -> Tensor:
    """(n, out) = rows (n, in) @ weight (out, in)^T + bias (out,).

    Args:
        team: Computes parts of the outputs if the matrix is large; no bit depends on that.
    """
    parts = _output_parts(rows, weight, team)
    if team is None or len(parts) == 1:
        return _times_transposed(rows, weight, bias)
    output = rows.new_empty(len(rows), len(weight))

    def compute(part: slice) -> None:
        own_bias = None if bias is None else bias[part]
        output[:, part] = _times_transposed(rows, weight[part], own_bias)

    team.run([partial(compute, part) for part in parts])
    return output


def _output_parts(rows: Tensor, weight: Tensor, team: ThreadTeam | None) -> list[slice]:
    """One part also where the kernel is not known to give the same bits for any part."""
    count = 1
    if (
        team is not None
        and rows.device.type == "cpu"
        and rows.dtype in (torch.float32, torch.bfloat16)
        and not (torch.is_grad_enabled() and rows.requires_grad)
        and _has_onednn()
    ):
        count = max(1, min(team.most_parts, weight.numel() // PART_NUMBERS))
    return cut(len(weight), count, ROWS_MULTIPLE)


def _times_transposed(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not _has_own_kernel(rows, weight):
        return linear(rows, weight, bias)
    return _with_onednn(rows, weight, bias)


def times_frozen(rows: Tensor, weight: Tensor) -> Tensor:
    """(n, in) = rows (n, out) @ weight (out, in): the gradient of ``times_transposed``'s rows."""
    if not _has_own_kernel(rows, weight):
        return rows @ weight
    return _with_onednn(rows, weight.T, None)


def _with_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    is_alone = len(rows) == 1
    rows = pad(rows, (0, 0, 0, 1)) if is_alone else rows.contiguous()
    # The operator to which torch.compile lowers linear layers; eager torch takes it for bfloat16
    # only.
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product[:1].clone() if is_alone else product  # a view could not be changed in place


def _has_own_kernel(rows: Tensor, weight: Tensor) -> bool:
    """Whether ``_with_onednn`` computes this; it knows no autograd."""
    return (
        rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and len(rows) > 0
        and not (torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad))
        and _has_onednn()
    )


@cache
def _has_onednn() -> bool:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    is_there = torch.backends.mkldnn.is_available()
    return is_x86 and is_there and hasattr(torch.ops.mkldnn, "_linear_pointwise")
