"""The memory of a training pass, known before it begins.

A pass over few tokens is measured in both ways (``recompute``), tensor by tensor; its bytes grow
with the number of rows. From this the plan says for each micro-batch whether its layers can keep
their activations, and for each datum whether it fits at all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from training.engine.torch import memory
from training.engine.torch.adapters import AdapterLayout, AdapterTensors
from training.engine.torch.attention.sequences import SequenceAttention
from training.engine.torch.attention.tiles import most_scores
from training.engine.torch.attention.variants import PLAIN, Reach, Variant
from training.engine.torch.base_model import BaseModel
from training.engine.torch.live_bytes import LiveBytes
from training.engine.torch.lm_head import CHUNK_BYTES
from training.engine.torch.out_of_memory import out_of_memory_by_name
from training.engine.torch.packing.ranges import RowRange
from training.engine.torch.packing.stream import KeptInputs, PackedContext, Segment

MOST_ROWS = 2**24
"""More than a pass can have."""

PLANNED_ROWS = 1024
"""A smaller pass keeps its activations, and is not planned."""

MEASURED_ROWS = 64
"""The rows of the first pass that is measured, without the shares that attention keeps of short
sequences, up to a fifth more. In the padded layout they are a chunk of a recurrent layer."""

SHARE = 4
"""Without a setting, activations may take a fourth of the free memory: what is left serves the
key-value cache, adapters that come, and other processes."""

HEAD_BYTES = 3 * CHUNK_BYTES
"""A chunk of logits, its exponentials, and its gradient in the model's dtype."""

SCORE_BYTES = 3 * torch.float32.itemsize
"""Of one score of an attention by blocks: its share, and the gradient of each."""

SINK_BYTES = 2 * torch.float32.itemsize
"""Of one score with sinks besides: it is copied."""


class Scores:
    """The scores of the layers' attention that exist at one time."""

    def __init__(self) -> None:
        self._heads: dict[tuple[Reach, int], int] = {}
        """By reach and bytes of a score: the query heads of layers that compute blocks."""

    def note(self, variant: Variant, num_heads: int) -> None:
        """Note a layer that computes blocks."""
        key = (variant.reach, SCORE_BYTES + (0 if variant.sinks is None else SINK_BYTES))
        self._heads[key] = max(self._heads.get(key, 0), num_heads)

    def bytes_of(self, num_rows: int, longest: int) -> int:
        """The most bytes of scores of a pass, with its longest sequence. The plan adds them to the
        rest, though other tensors may be most at another time."""
        sizes = [
            score_bytes * most_scores(num_rows, longest, reach, num_heads)
            for (reach, score_bytes), num_heads in self._heads.items()
        ]
        return max(sizes, default=0)


@dataclass(frozen=True, kw_only=True)
class PassBytes:
    """The most memory of a pass's tensors, by its number of rows."""

    fixed: float
    by_row: float
    by_square: float = 0.0
    scores: Scores = field(default_factory=Scores)

    def of(self, num_rows: int, longest: int) -> int:
        """``longest``: The rows of the longest sequence; a mask is as wide as its sequence."""
        measured = self.fixed + (self.by_row + self.by_square * longest) * num_rows
        return int(measured) + self.scores.bytes_of(num_rows, longest)

    def rows_within(self, num_bytes: int) -> int:
        """The most rows that take no more than this."""
        rows = range(MOST_ROWS)
        return max(0, bisect_right(rows, num_bytes, key=lambda n: self.of(n, n)) - 1)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The plan for one micro-batch."""

    num_bytes: int
    """The most memory of its tensors. In the padded layout it may be larger than what is used:
    there a layer's mask grows with the square of the rows, and other memory does not."""
    recomputes: bool


class MemoryPlan:
    """Plans the passes of one base model; measures it when the first large pass comes."""

    def __init__(
        self,
        base_model: BaseModel,
        *,
        activation_bytes: int = 0,
        free_bytes: Callable[[torch.device], int] = memory.free_bytes,
    ) -> None:
        """
        Args:
            activation_bytes: Of a pass that keeps its activations; 0 is a share of what is free.
            free_bytes: The memory of a device that passes may still take.
        """
        self._base_model = base_model
        self._activation_bytes = activation_bytes
        self._free_bytes_of = free_bytes
        self._measured: dict[tuple[tuple[str, ...], bool], tuple[int, PassBytes]] = {}

    def of_pass(
        self, row_ranges: Sequence[RowRange], layouts: Sequence[AdapterLayout]
    ) -> Planned | None:
        """The plan for a micro-batch of these sequences that trains adapters of these layouts; None
        if it is too small to need one."""
        least = self._base_model.chunk_tokens if self._base_model.is_padded else 0
        num_rows = sum(max(row_range.length, least) for row_range in row_ranges)
        longest = max(row_range.num_keys for row_range in row_ranges)
        if num_rows < PLANNED_ROWS or not layouts:
            return None
        limit = self._activation_bytes or self._free_bytes() // SHARE
        grad_bytes = sum(4 * layout.num_parameters for layout in layouts)

        def most_bytes(*, recomputes: bool) -> int:
            measured = [self._bytes(layout, recomputes=recomputes) for layout in layouts]
            return max(of_layout.of(num_rows, longest) for of_layout in measured) + grad_bytes

        keeping = most_bytes(recomputes=False)
        if keeping <= limit or not self._base_model.can_recompute:
            return Planned(num_bytes=keeping, recomputes=False)
        return Planned(num_bytes=most_bytes(recomputes=True), recomputes=True)

    def longest(self, layout: AdapterLayout) -> int:
        """The most tokens of one datum that now fit into memory when it is trained on.

        Raises:
            OutOfMemory: Not even the short passes fit that are measured first.
        """
        recomputes = self._base_model.can_recompute
        return self._bytes(layout, recomputes=recomputes).rows_within(self._free_bytes())

    def _free_bytes(self) -> int:
        return self._free_bytes_of(self._base_model.device)

    def _bytes(self, layout: AdapterLayout, *, recomputes: bool) -> PassBytes:
        key = (tuple(layout.places), recomputes)
        if key not in self._measured:
            with out_of_memory_by_name():
                self._measured[key] = layout.rank, self._measure(layout, recomputes=recomputes)
        rank, measured = self._measured[key]
        if recomputes:  # the products of one layer only
            return measured
        wider = (layout.rank - rank) * len(layout.places) * self._base_model.dtype.itemsize
        return replace(measured, by_row=measured.by_row + wider)

    def _measure(self, layout: AdapterLayout, *, recomputes: bool) -> PassBytes:
        scores = Scores()

        def measured(num_rows: int) -> int:
            return tensor_bytes(
                self._base_model, layout, num_rows, recomputes=recomputes, scores=scores
            )

        base_model = self._base_model
        rows = base_model.chunk_tokens if base_model.is_padded else MEASURED_ROWS
        # A parabola through three passes; of packed streams two, where nothing grows with the
        # square. Within the context: a model may have no later positions.
        n1 = min(rows, base_model.info.max_context_tokens // 3)
        n2, n3 = 2 * n1, 3 * n1
        b1, b2 = measured(n1), measured(n2)
        slope, by_square = (b2 - b1) / (n2 - n1), 0.0
        if self._base_model.is_padded:  # transformers' masks
            by_square = max(0.0, ((measured(n3) - b2) / (n3 - n2) - slope) / (n3 - n1))
        by_row = max(1.0, slope - by_square * (n1 + n2))
        fixed = max(0.0, b1 - (by_row + by_square * n1) * n1)
        return PassBytes(
            fixed=fixed + HEAD_BYTES, by_row=by_row, by_square=by_square, scores=scores
        )


class _Noting(SequenceAttention):
    """Notes the scores of layers that compute their attention by blocks, and computes them by the
    fused kernel: its results are wrong, but its memory is that without scores."""

    def __init__(
        self, row_ranges: Sequence[RowRange], scores: Scores, *, keeps_outputs: bool
    ) -> None:
        super().__init__(row_ranges, fuses=True)
        self._scores = scores
        self._keeps_all = keeps_outputs
        self._kept: dict[int, Tensor] = {}

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        variant: Variant = PLAIN,
    ) -> Tensor:
        output = super().attend(layer_idx, query, key, value, scaling, PLAIN)
        if query.device.type == "cpu" or variant is not PLAIN:
            self._scores.note(variant, query.shape[1])
            if self._keeps_all and self._kept.pop(layer_idx, None) is None:
                self._kept[layer_idx] = output.detach()
        return output


def tensor_bytes(
    base_model: BaseModel,
    layout: AdapterLayout,
    num_rows: int,
    *,
    recomputes: bool,
    scores: Scores | None = None,
) -> int:
    """The most bytes of tensors in a pass through the decoder and back, over one sequence of so
    many tokens, with the kernels for long ones. An adapter of zeros is trained, without a trace.

    Args:
        scores: Notes the scores of layers that compute their attention by blocks; the result is
            without them.
    """
    device = base_model.device
    weights, grad = (
        AdapterTensors(layout, torch.zeros(layout.num_parameters, device=device)) for _ in range(2)
    )
    converted = [weights.pair(name, base_model.dtype) for name in layout.places]
    existing = [grad.flat, *(tensor for pair in converted if pair is not None for tensor in pair)]
    existing += base_model.frozen_tensors()
    with base_model.holder.team.alone(), torch.enable_grad(), LiveBytes(existing) as live:
        hidden = _states(base_model, num_rows, weights, grad, recomputes, scores)
        if hidden.requires_grad:
            hidden.backward(torch.zeros_like(hidden))
    peak: int = live.peak_bytes
    return peak


def _states(
    base_model: BaseModel,
    num_rows: int,
    weights: AdapterTensors,
    grad: AdapterTensors,
    recomputes: bool,
    scores: Scores | None,
) -> Tensor:
    tokens = torch.zeros(num_rows, dtype=torch.int64, device=base_model.device)
    positions = torch.arange(num_rows, device=base_model.device)
    segments = [Segment(start=0, end=num_rows, weights=weights, grad=grad)]
    row_ranges = [RowRange(start=0, length=num_rows)]
    if base_model.is_padded:
        return base_model.sequence_states(
            tokens, positions, segments, row_ranges, recomputes=recomputes
        )
    context = PackedContext(
        segments=segments,
        attention=(
            SequenceAttention(row_ranges, kept_keys=0, keeps_outputs=recomputes)
            if scores is None
            else _Noting(row_ranges, scores, keeps_outputs=recomputes)
        ),
        kept_inputs=KeptInputs() if recomputes else None,
    )
    return base_model.hidden_states(tokens, positions, context)
