"""Builds an array of the SDK from its parts: flat values, a shape, perhaps CSR indices.

Protobuf and JSON have the same parts, so they are checked here once. Data
is copied only for CSR, bfloat16 and a change of dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from futures.payload import MAX_BYTES
from training.errors import InvalidDatum, LimitExceeded

Array = NDArray[Any]


class DenseBudget:
    """The memory budget of one request's sparse arrays in dense form.

    A few bytes can describe an array of any size. The budget is the size limit of a payload.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

    def take(self, num_bytes: int, where: str) -> None:
        """Raises LimitExceeded at the array that would exceed the limit."""
        self.num_bytes += num_bytes
        if self.num_bytes > self.max_bytes:
            raise LimitExceeded(
                f"{where}: the sparse arrays take more than {self.max_bytes} bytes once dense"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorParts:
    """The parts of an array in a body."""

    values: Array
    """(n,) all cells in C order, or the listed cells of a CSR array."""
    shape: tuple[int, ...] | None
    """None means one dimension."""
    crow_indices: NDArray[np.int64] | None = None
    """(rows + 1,) where each row begins in ``values``; None for a dense array."""
    col_indices: NDArray[np.int64] | None = None
    """(n,) the column of each listed cell."""


def build_array(parts: TensorParts, where: str, *, pad: int, budget: DenseBudget) -> Array:
    """(N,) or (N, K), at least one cell, in the dtype of the values.

    Args:
        pad: The value of cells that a CSR array does not list.

    Raises:
        InvalidDatum: Values, shape and indices do not make an array. (400)
        LimitExceeded: It would take too much memory. (400)
    """
    values, shape = parts.values, parts.shape
    if shape is not None:
        if len(shape) not in (1, 2):
            raise InvalidDatum(
                f"{where}.shape: {len(shape)} dimensions instead of 1 or 2; got {list(shape)[:8]}"
            )
        if min(shape) < 1:
            raise InvalidDatum(f"{where}.shape: {list(shape)} has a size below 1")
    if parts.crow_indices is not None or parts.col_indices is not None:
        return _dense(parts, where, pad, budget)
    if shape is None:
        if not values.size:
            raise InvalidDatum(f"{where}: no values")
        return values
    if math.prod(shape) != values.size:
        raise InvalidDatum(f"{where}: {values.size} values for shape {list(shape)}")
    return values.reshape(shape)


def _dense(parts: TensorParts, where: str, pad: int, budget: DenseBudget) -> Array:
    values, shape, crow, col = parts.values, parts.shape, parts.crow_indices, parts.col_indices
    if shape is None or len(shape) != 2:
        raise InvalidDatum(f"{where}.shape: a sparse array has a shape [N, K]")
    if crow is None or col is None:
        raise InvalidDatum(f"{where}: a sparse array has both crow and col indices")
    rows, columns = shape
    if len(crow) != rows + 1:
        raise InvalidDatum(f"{where}: {len(crow)} crow indices for {rows} rows")
    if len(col) != len(values):
        raise InvalidDatum(f"{where}: {len(col)} col indices for {len(values)} values")
    if crow[0] != 0 or crow[-1] != len(values):
        raise InvalidDatum(
            f"{where}: crow indices from {crow[0]} to {crow[-1]} instead of 0 to {len(values)}"
        )
    falls = crow[1:] < crow[:-1]
    if falls.any():
        raise InvalidDatum(f"{where}: crow index {int(falls.argmax()) + 1} is below the one before")
    outside = (col < 0) | (col >= columns)
    if outside.any():
        index = int(outside.argmax())
        raise InvalidDatum(f"{where}: col index {index} is {col[index]}, outside {columns} columns")
    budget.take(rows * columns * values.itemsize, where)
    row = np.repeat(np.arange(rows), np.diff(crow))
    repeats = (row[1:] == row[:-1]) & (col[1:] <= col[:-1])
    if repeats.any():
        index = int(repeats.argmax()) + 1
        raise InvalidDatum(f"{where}: col index {index} is not above the one before in its row")
    dense = np.full((rows, columns), pad, values.dtype)
    dense[row, col] = values
    return dense
