"""The packed stream and its context, which all parts of the engine use.

Every pass over the base model, training and sampling alike, is ONE stream of T tokens without
padding, shape (1, T) to transformers. A ``PackedContext`` assigns the rows:

- ``segments`` cut the rows among adapters. Consecutive, without gaps, covering 0..T. LoRA
  layers and the output head read them: rows of a segment use that segment's weights.
- ``attention`` decides which keys a query sees. The model computes rotated queries, keys and
  values for all T rows, then calls ``attend`` once per layer; the implementation keeps
  sequences apart. Training uses ``attention.sequences.SequenceAttention``; the sampler has its own,
  which also stores the new keys and values in its cache and reads the old ones from there.

The way to run a pass is ``BaseModel.hidden_states(tokens, position_ids, context)`` and then
``BaseModel.logits(rows, segments)`` for the rows whose next token matters. Position ids are the
caller's: for a cached sequence they continue after the cache.

The context is passed explicitly: attention functions get it as a keyword argument that
transformers passes on; LoRA layers get only their input, so they read it from the
``ContextHolder`` that their base model shares with them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training.engine.torch.adapters import AdapterTensors
from training.engine.torch.attention.interface import Attention
from training.engine.torch.thread_team import ThreadTeam

if TYPE_CHECKING:
    from training.engine.torch.padded.side_by_side import SideBySide

MIN_ROWS = 16
"""Fewest rows that a training pass gives to a matrix product of the base model; padding makes
up for missing ones. CPU kernels for very few rows sum in another order than those for many, so
without this a small request's last bits would depend on its batch-mates."""

ROWS_MULTIPLE = 4
"""The rows of a product are padded to a multiple of this. CPU kernels take rows in such blocks and
sum the remaining ones in another order, so without it a row's last bits would depend on its place
(measured with MKL and oneDNN, one thread and several)."""

RANK_MULTIPLE = 8
"""On a CPU, A and B of other ranks get zeros up to a multiple of this in products. Then a row has
the same bits among few rows and among many; at ranks 1 and 5 it has not (float32, MKL)."""

SMALL_PRODUCT = 16**3
"""Up to this many multiplications torch uses another kernel for a bfloat16 product on a CPU, which
sums in another order: few rows of low rank, or of a small model, are affected."""


def fewest_rows(device: torch.device, dtype: torch.dtype, matrix_size: int) -> int:
    """The least rows of a product with a matrix of this many elements for which their number does
    not affect any row's bits."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return 0
    return max(2, SMALL_PRODUCT // matrix_size + 1)  # one row alone has a kernel of its own


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is at least ``number``."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """Rows ``start`` to ``end`` (exclusive) of a stream, all under one adapter."""

    start: int
    end: int
    weights: AdapterTensors | None
    """The adapter's weights in this pass; None is the bare base model."""
    grad: AdapterTensors | None = None
    """The buffer to which this pass adds the adapter's gradient; None computes none for these
    rows."""

    @property
    def rows(self) -> slice:
        return slice(self.start, self.end)

    def repeated(self, times: int) -> Segment:
        """The segment in a stream that has each row so many times, one after the other."""
        if times == 1:
            return self
        return replace(self, start=self.start * times, end=self.end * times)


class KeptInputs:
    """The inputs of a pass's layers, in one block of memory.

    Kept one by one between the freed tensors of their layers they would split a CPU's heap: the
    process then takes four times the memory that its tensors have (measured with glibc).
    """

    def __init__(self) -> None:
        self._block: Tensor | None = None
        self._num_kept = 0

    def keep(self, hidden: Tensor, num_layers: int) -> Tensor:
        """A copy of one layer's input, a leaf for autograd.

        Args:
            hidden: Of the same shape for each of the ``num_layers`` layers.
        """
        if self._block is None:
            self._block = hidden.new_empty((num_layers, *hidden.shape))
        kept = self._block[self._num_kept]
        kept.copy_(hidden.detach())
        self._num_kept += 1
        return kept.detach().requires_grad_(hidden.requires_grad)


@dataclass(frozen=True, kw_only=True, eq=False)
class PassContext:
    """The LoRA layers' information about the rows of the current pass."""

    segments: Sequence[Segment]
    kept_inputs: KeptInputs | None = None
    """Where layers keep their input for the backward pass, which computes the rest again (see
    ``recompute``); None: they keep all that it needs."""

    @cached_property
    def adapted(self) -> list[list[Segment]]:
        """The segments with an adapter; adjacent ones that may share a product are a group."""
        return [group for group in join(self.segments) if group[0].weights is not None]


@dataclass(frozen=True, kw_only=True, eq=False)
class SingleContext:
    """The LoRA layers' information about a pass of one adapter without a gradient.

    Layers may have different numbers of rows: some read all cached tokens again.
    """

    weights: AdapterTensors | None
    enough_rows: Callable[[int], int]
    """For a number of rows, the least number, at least that, for which a matrix product gives each
    row the same bits as for any larger one."""

    def of(self, num_rows: int) -> PassContext:
        """The context of a layer with this number of rows, padding included."""
        return PassContext(segments=uniform_segments(num_rows, self.weights))


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedContext(PassContext):
    """All layers' information about the packed stream of the current pass."""

    attention: Attention
    is_long: Tensor | None = None
    """(T,) bool, rows of sequences longer than the base model's ``rotary_switch``; None: no row
    is."""


def join(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Group adjacent segments of one adapter if that does not affect a row's bits."""
    groups: list[list[Segment]] = []
    for segment in segments:
        if groups and _may_join(groups[-1][-1], segment):
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


def rows_of(group: Sequence[Segment]) -> slice:
    """The rows of a group of joined segments in the stream."""
    return slice(group[0].start, group[-1].end)


def _may_join(left: Segment, right: Segment) -> bool:
    return (
        left.weights is right.weights
        and left.weights is not None
        and min(left.end - left.start, right.end - right.start) >= MIN_ROWS
    )


class _OwnPass(threading.local):
    """The pass of the current thread."""

    context: PassContext | SingleContext | None = None


class ContextHolder:
    """Holds the context of a thread's current pass for the LoRA layers of one base model.

    Several threads may each run a pass. Where autograd computes a part of a pass again in a thread
    of its own, that thread makes the context its current one (``recompute``).
    """

    def __init__(self) -> None:
        self._own = _OwnPass()
        self.beside: SideBySide | None = None
        """The passes beside the current one that share its products; None: there are none."""
        self.team = ThreadTeam()
        """Computes parts of large products on a CPU."""
        self.on_progress: Callable[[], None] = _nothing
        """Called by every LoRA layer, in both directions, so that a long pass shows progress."""

    @property
    def current(self) -> PassContext | SingleContext | None:
        """The context of this thread's pass; None outside of passes."""
        return self._own.context

    @contextmanager
    def active(self, context: PassContext | SingleContext) -> Iterator[None]:
        """Make ``context`` the current one; a thread's passes do not nest."""
        self._own.context = context
        try:
            yield
        finally:
            self._own.context = None


def _nothing() -> None:
    """Report nothing."""


def uniform_segments(num_rows: int, weights: AdapterTensors | None) -> tuple[Segment, ...]:
    """One segment over all rows, without a gradient."""
    return (Segment(start=0, end=num_rows, weights=weights),)
