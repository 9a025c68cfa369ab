"""Products of groups of rows, each group with its own matrix.

``ends[e]`` is the row after the last one of group e; groups are consecutive, and may be empty.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from training.engine.torch.frozen_products import SMALLEST_BLOCK, by_equal_blocks, needs_blocks

ALIGNMENT_BYTES = 16
"""Condition of torch's grouped product for the address of its arguments and every stride."""


def grouped_times(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """(P, N) = rows (P, K), those of group e @ matrices[e] (K, N)."""
    if needs_blocks(rows, matrices):
        by_group = rows.new_empty(len(rows), matrices.shape[2])
        for expert, group in _groups(ends):
            by_group[group] = by_equal_blocks(rows[group], matrices[expert], SMALLEST_BLOCK)
        return by_group
    if _is_aligned(rows) and _is_aligned(matrices) and _is_aligned_width(matrices.shape[2], rows):
        return grouped_mm(rows, matrices, offs=ends)
    output = rows.new_zeros(len(rows), matrices.shape[2])
    for expert, group in _groups(ends):
        torch.mm(rows[group], matrices[expert], out=output[group])
    return output


def grouped_sums(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """(E, M, N) = left (P, M) of group e, transposed, @ right (P, N) of group e."""
    if _is_aligned(left) and _is_aligned(right) and _is_aligned_width(right.shape[1], right):
        return grouped_mm(left.T, right, offs=ends)
    output = left.new_zeros(len(ends), left.shape[1], right.shape[1])
    for expert, group in _groups(ends):
        torch.mm(left[group].T, right[group], out=output[expert])
    return output


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """The groups that have rows."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


def _is_aligned(tensor: Tensor) -> bool:
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride() if stride != 1]
    bytes_apart = [tensor.data_ptr(), *strides]
    return len(strides) == tensor.ndim - 1 and not any(n % ALIGNMENT_BYTES for n in bytes_apart)


def _is_aligned_width(width: int, like: Tensor) -> bool:
    return width * like.element_size() % ALIGNMENT_BYTES == 0
