"""Decides which datums of checked jobs go through the model together.

A part is a set of jobs that share their products with LoRA matrices: one job where bits matter, all
jobs of an adapter where speed does. Its datums also share their prefixes (``shared_prefixes``).
Each part is first cut into pieces by itself, with datums of a common prefix next to each other, and
micro-batches consist of whole pieces, in order. So the datums that are summed, their order and
their sharing do not depend on the other parts of a call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from training.engine.interface import ForwardBackwardJob
from training.engine.torch.packing.prefix_tree import SHARED_BLOCK, Path
from training.loss_fns import CUSTOM, LOSS_FNS

SHARED_SHARE = 8
"""A piece that is long enough may end before a datum that would share up to this fraction of its
rows (one eighth), which are then computed once more."""

MOST_GRAD_BYTES = 512 * 2**20
"""Of the gradients of a micro-batch's pieces, beside the first of each adapter."""

KEYS_PER_ROW = 8
"""Most datums that read a row as a key, on average over a piece. Each datum's attention makes
copies of the keys that it shares; one is small compared with a row's other data for the backward
pass (about a fiftieth), many are not."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedJob:
    """A job that was checked, with its loss's complete config."""

    job: ForwardBackwardJob
    config: Mapping[str, float]
    part: tuple[str, int]
    """Jobs of one part share their matrix products. The adapter's name, and a number that
    distinguishes its parts."""

    @property
    def float_inputs(self) -> tuple[str, ...]:
        """Inputs with a value for each target; a custom loss reads its inputs by datum."""
        loss_fn = self.job.loss_fn
        return () if loss_fn == CUSTOM else LOSS_FNS[loss_fn].float_inputs

    @property
    def is_elementwise(self) -> bool:
        """Whether the loss of a token depends on that token alone."""
        return self.job.loss_fn != CUSTOM and LOSS_FNS[self.job.loss_fn].is_elementwise

    @property
    def loss_key(self) -> tuple[Any, ...]:
        """Equal for jobs whose losses are the same function of their inputs."""
        return (self.job.loss_fn, *sorted(self.config.items()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """One datum that has no rows yet: what planning needs to know of it."""

    number: int
    """Its index among the datums of all jobs of the call."""
    num_tokens: int
    loss_key: tuple[Any, ...]
    path: Path
    """The blocks at its beginning that other datums of its part share."""


class Piece:
    """Datums of one part that go through the model together and share their prefixes."""

    def __init__(self, part: tuple[str, int]) -> None:
        self.part = part
        self.items: list[Item] = []
        self.num_rows = 0
        self._num_keys = 0
        self._blocks: set[int] = set()

    @property
    def size(self) -> int:
        """Size in tokens of the budget."""
        return max(self.num_rows, self._num_keys // KEYS_PER_ROW)

    def add(self, item: Item) -> None:
        self.num_rows += self._rows_needed(item)
        self._num_keys += item.num_tokens
        self._blocks.update(item.path)
        self.items.append(item)

    def size_with(self, item: Item) -> int:
        """``size`` if the datum were added."""
        num_keys = self._num_keys + item.num_tokens
        return max(self.num_rows + self._rows_needed(item), num_keys // KEYS_PER_ROW)

    def shares_little(self, item: Item) -> bool:
        """Whether the datum would share few of the piece's rows."""
        return SHARED_SHARE * self._rows_shared(item) <= self.num_rows

    def _rows_needed(self, item: Item) -> int:
        return item.num_tokens - self._rows_shared(item)

    def _rows_shared(self, item: Item) -> int:
        return SHARED_BLOCK * len(self._blocks.intersection(item.path))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest pieces and micro-batches."""

    token_budget: int
    """Largest sum of a micro-batch's sizes, unless a single datum is larger."""
    piece_rows: int | None = None
    """A piece that would be larger ends before a datum that shares little with it; None: the
    token budget is the only limit."""
    is_split: bool = False
    """Whether a micro-batch of several pieces is no larger than ``piece_rows``, so that several
    threads get some."""
    grad_bytes: Mapping[str, int] = field(default_factory=dict)
    """The gradient's size by adapter. The pieces of a micro-batch have one each."""

    @property
    def batch_rows(self) -> int:
        return (self.is_split and self.piece_rows) or self.token_budget


def plan_pieces(
    parts: Mapping[tuple[str, int], Sequence[Item]], limits: Limits
) -> list[list[Piece]]:
    """The pieces of each micro-batch; every datum of every part is in one piece."""
    batches: list[list[Piece]] = []
    for part, items in parts.items():
        for piece in _cut_part(part, items, limits):
            if not batches or not _fits(piece, batches[-1], limits):
                batches.append([])
            batches[-1].append(piece)
    return batches


def _fits(piece: Piece, batch: Sequence[Piece], limits: Limits) -> bool:
    if sum(each.size for each in batch) + piece.size > limits.batch_rows:
        return False
    adapters = [name for name, _ in (*(each.part for each in batch), piece.part)]
    # An adapter's first gradient becomes the sum that the pass returns.
    further = sum((n - 1) * limits.grad_bytes.get(name, 0) for name, n in Counter(adapters).items())
    return further <= MOST_GRAD_BYTES


def _cut_part(part: tuple[str, int], items: Sequence[Item], limits: Limits) -> list[Piece]:
    """Cut a part into pieces: datums ordered by prefix, then by loss, the longest first."""
    loss_order: dict[tuple[Any, ...], int] = {}
    for item in items:
        loss_order.setdefault(item.loss_key, len(loss_order))
    pieces: list[Piece] = []
    for item in sorted(items, key=lambda i: (i.path, loss_order[i.loss_key], -i.num_tokens)):
        size = pieces[-1].size_with(item) if pieces else 0
        if (
            not pieces
            or size > limits.token_budget
            or (size > (limits.piece_rows or size) and pieces[-1].shares_little(item))
        ):
            pieces.append(Piece(part))
        pieces[-1].add(item)
    for piece in pieces:
        piece.items.sort(key=lambda i: loss_order[i.loss_key])
    return pieces
