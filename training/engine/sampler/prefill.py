"""Reading prompts into the cache of the packed layout, a chunk at a time.

It also reads sequences again that have lost their blocks: their prompt and sampled tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from training.engine.sampler.block_table import BlockTable, BlockTables
from training.engine.sampler.model_step import ModelStep
from training.engine.sampler.row_padding import RowPadding
from training.engine.sampler.sequence import ActiveRequest, ActiveSequence
from training.engine.torch.attention.paged import PagedAttention
from training.engine.torch.attention.paged_parts import Part
from training.engine.torch.base_model import BaseModel
from training.engine.torch.packing.stream import Segment, uniform_segments
from training.engine.torch.vision.placement import SequenceRows

LOGITS_ROWS = 64
"""Rows of a prompt whose logits exist at one time, (64, V) float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chunk:
    """The next tokens of a sequence that are read in a pass."""

    request: ActiveRequest
    sequence: ActiveSequence
    table: BlockTable
    start: int
    """The number of its tokens that are in the cache before the pass."""
    end: int
    first_row: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def tokens(self) -> list[int]:
        return self.request.tokens(self.sequence, self.start, self.end)

    @property
    def part(self) -> Part:
        return Part(
            first_row=self.first_row,
            start=self.start,
            num_tokens=self.num_tokens,
            blocks=self.table.blocks,
        )

    @property
    def image_rows(self) -> SequenceRows:
        return SequenceRows(
            tokens=np.asarray(self.request.tokens(self.sequence, 0, self.end), np.int64),
            images=self.request.job.images,
            start=self.start,
            rows=np.arange(self.first_row, self.first_row + self.num_tokens),
        )


class Prefill:
    """Passes that read prompts, and sequences again."""

    def __init__(self, step: ModelStep, tables: BlockTables, *, chunk_tokens: int) -> None:
        """``chunk_tokens``: most tokens in one pass."""
        self._step = step
        self._tables = tables
        self._chunk_tokens = chunk_tokens

    def run(self, requests: Sequence[ActiveRequest]) -> dict[ActiveRequest, Tensor]:
        """Read the next chunk of as many of the requests as fit into a pass, in order.

        Returns:
            The prompt's last row (H,) of each request whose prompt was read to its end.
        """
        lengths: list[int] = []
        tokens: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        chunks: list[_Chunk] = []
        for request in requests:
            chunk = self._next_chunk(request, first_row=len(tokens))
            missing = self._step.padding.of_segment(chunk.num_tokens, among=len(requests))
            padding = [0] * missing
            num_rows = chunk.num_tokens + len(padding)
            if chunks and len(tokens) + num_rows > self._chunk_tokens:
                break
            chunks.append(chunk)
            tokens += [*chunk.tokens, *padding]
            positions += [*self._positions(chunk), *padding]
            lengths += [request.length(chunk.sequence)] * num_rows
            segments.append(
                Segment(start=chunk.first_row, end=len(tokens), weights=request.weights)
            )
        padding = [0] * self._step.padding.fill(segments)
        tokens += padding
        positions += padding
        lengths += padding
        parts = [chunk.part for chunk in chunks]
        attention = PagedAttention(self._step.cache, parts, len(tokens))
        images = [chunk.image_rows for chunk in chunks if chunk.request.job.images]
        hidden = self._step.hidden_states(tokens, positions, segments, attention, lengths, images)
        return {
            chunk.request: hidden[chunk.first_row + chunk.num_tokens - 1]
            for chunk in chunks
            if self._note_read(chunk, hidden)
        }

    def _note_read(self, chunk: _Chunk, hidden: Tensor) -> bool:
        """Record that a chunk was read; whether that was the end of a prompt."""
        request, start, end = chunk.request, chunk.start, chunk.end
        own = hidden[chunk.first_row : chunk.first_row + chunk.num_tokens]
        self._tables.note_stored(chunk.table, end, *request.naming(chunk.sequence))
        if request.is_prefilled:
            if end == request.length(chunk.sequence) - 1:
                request.rereads.remove(chunk.sequence)
            return False
        score_prompt(self._step.base_model, request, start, own)
        request.note_read(end)
        return request.is_prefilled

    def first_logits(self, last_hidden: Mapping[ActiveRequest, Tensor]) -> Tensor:
        """(n, V) for the token after each of n prompts, whose last rows (H,) are given; then
        padding rows.

        Their sequences may be decoded from then on: they share the prompt's blocks.
        """
        for request in last_hidden:
            first, *others = request.sequences
            assert first.table is not None  # noqa: S101 - it has read the prompt
            for sequence in others:
                sequence.table = self._tables.fork(first.table)
        return prompt_logits(self._step.base_model, self._step.padding, last_hidden)

    def _next_chunk(self, request: ActiveRequest, *, first_row: int) -> _Chunk:
        sequence, end = request.sequences[0], len(request.job.prompt)
        if request.is_prefilled:
            sequence = request.rereads[0]
            end = request.length(sequence) - 1
        table = sequence.table
        assert table is not None  # noqa: S101 - it has started, or was resumed
        return _Chunk(
            request=request,
            sequence=sequence,
            table=table,
            start=table.num_stored,
            end=min(table.num_stored + self._chunk_tokens, end),
            first_row=first_row,
        )

    def _positions(self, chunk: _Chunk) -> list[int]:
        """The rotary positions of a chunk's tokens; those in a prompt with images are replaced."""
        split, skipped = len(chunk.request.job.prompt), chunk.request.skipped_positions
        return [n if n < split else n + skipped for n in range(chunk.start, chunk.end)]


def prompt_logits(
    base_model: BaseModel, padding: RowPadding, last_hidden: Mapping[ActiveRequest, Tensor]
) -> Tensor:
    """(n, V) for the token after each of n prompts, whose last rows (H,) are given; then padding
    rows."""
    segments = [
        Segment(start=i, end=i + 1, weights=request.weights)
        for i, request in enumerate(last_hidden)
    ]
    missing = padding.of_segment(len(last_hidden))
    hidden = pad(torch.stack(list(last_hidden.values())), (0, 0, 0, missing))  # (n, H)
    return base_model.logits(hidden, segments)


def score_prompt(base_model: BaseModel, request: ActiveRequest, start: int, hidden: Tensor) -> None:
    """Score a request's prompt with the rows ``hidden`` (n, H) of its tokens from ``start`` on;
    the row of position i predicts the token at i + 1."""
    end = min(start + len(hidden), len(request.job.prompt) - 1)
    for row in range(max(start, request.scorer.first_position - 1), end, LOGITS_ROWS):
        rows = hidden[row - start : min(row + LOGITS_ROWS, end) - start]  # (n, H)
        segments = uniform_segments(len(rows), request.weights)
        request.scorer.add(row + 1, base_model.logits(rows, segments))  # (n, V)
