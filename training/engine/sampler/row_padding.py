"""How many rows a pass for sampling needs, so that their number affects no row's bits."""

from __future__ import annotations

import torch

from training.engine.torch.base_model import BaseModel
from training.engine.torch.packing import stream
from training.engine.torch.packing.stream import Segment, round_up

ROWS_MULTIPLE = {torch.float32: 4, torch.bfloat16: 2}
"""The rows of each segment of a pass are padded to a multiple of this. CPU matrix kernels take
rows in such blocks and sum the remaining rows in another order (measured with MKL and oneDNN, one
thread and several), so without padding a row's last bits would depend on the number of rows."""

FEW_SEGMENTS = 2
"""A pass of so many segments, of one row each, takes no longer with a few more rows: then a segment
gets as many as its adapter's own products would be padded to."""


class RowPadding:
    """The padding of one base model's passes."""

    def __init__(self, base_model: BaseModel) -> None:
        self._rows_multiple = ROWS_MULTIPLE.get(base_model.dtype, 1)
        self._fewest_rows = base_model.fewest_rows

    def of_segment(self, num_rows: int, *, among: int = 1) -> int:
        """The padding rows for a segment of this size.

        Args:
            among: The segments of the pass.
        """
        is_few = among <= FEW_SEGMENTS
        return -num_rows % (stream.ROWS_MULTIPLE if is_few else self._rows_multiple)

    def fill(self, segments: list[Segment]) -> int:
        """Add a segment of padding rows for the pass; return their number."""
        start = segments[-1].end
        missing = max(0, self._fewest_rows - start)
        if missing:
            segments.append(Segment(start=start, end=start + missing, weights=None))
        return missing

    def enough(self, num_rows: int) -> int:
        """The rows of a pass of one segment, padding included."""
        return max(round_up(num_rows, self._rows_multiple), self._fewest_rows)
