"""Reading prompts into the cache of the packed layout, a chunk at a time.

It also reads the sampled tokens of a sequence again when its length makes the rotary factors of
all its tokens change (``rotary``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from training.engine.sampler.model_step import ModelStep
from training.engine.sampler.row_padding import RowPadding
from training.engine.sampler.sequence import ActiveRequest
from training.engine.torch.attention.cached import PrefillAttention, PrefillChunk
from training.engine.torch.base_model import BaseModel
from training.engine.torch.packing.stream import Segment, uniform_segments
from training.engine.torch.vision.placement import SequenceRows

LOGITS_ROWS = 64
"""Rows of a prompt whose logits exist at one time, (64, V) float32."""


class Prefill:
    """Passes that read prompts; the cuts into chunks depend on the prompt only."""

    def __init__(self, step: ModelStep, *, chunk_tokens: int) -> None:
        """``chunk_tokens``: most prompt tokens in one pass."""
        self._step = step
        self._chunk_tokens = chunk_tokens

    def run(self, requests: Iterable[ActiveRequest]) -> dict[ActiveRequest, Tensor]:
        """Read the next chunk of as many of the requests as fit into a pass, in order.

        Returns:
            The prompt's last row (H,) of each request whose prompt was read to its end.
        """
        lengths: list[int] = []
        tokens: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        chunks: list[tuple[ActiveRequest, PrefillChunk]] = []
        images: list[SequenceRows] = []
        for request in requests:
            chunk = self._next_chunk(request, first_row=len(tokens))
            padding = [0] * self._step.padding.of_segment(chunk.num_tokens)
            num_rows = chunk.num_tokens + len(padding)
            if chunks and len(tokens) + num_rows > self._chunk_tokens:
                break
            chunks.append((request, chunk))
            if request.job.images:
                images.append(_rows_of(request, chunk))
            tokens += [*request.unread_tokens[chunk.start : chunk.end].tolist(), *padding]
            positions += [*range(chunk.start, chunk.end), *padding]
            lengths += [request.read_as_length] * num_rows
            segments.append(
                Segment(start=chunk.first_row, end=len(tokens), weights=request.weights)
            )
        missing = [0] * self._step.padding.fill(segments)
        tokens += missing
        positions += missing
        lengths += missing
        attention = PrefillAttention(self._step.cache, [chunk for _, chunk in chunks])
        hidden = self._step.hidden_states(tokens, positions, segments, attention, lengths, images)
        last_hidden: dict[ActiveRequest, Tensor] = {}
        for request, chunk in chunks:
            if not request.is_prefilled:
                own = hidden[chunk.first_row : chunk.first_row + chunk.num_tokens]
                score_prompt(self._step.base_model, request, chunk.start, own)
                if chunk.end == len(request.job.prompt):
                    last_hidden[request] = hidden[chunk.first_row + chunk.num_tokens - 1]
            request.note_read(chunk.end)
        return last_hidden

    def first_logits(self, last_hidden: Mapping[ActiveRequest, Tensor]) -> Tensor:
        """(n, V) for the token after each of n prompts, whose last rows (H,) are given; then
        padding rows.

        Their sequences may be decoded from then on: each finds the prompt in its own rows.
        """
        logits = prompt_logits(self._step.base_model, self._step.padding, last_hidden)
        for request in last_hidden:
            assert request.region is not None  # noqa: S101 - reserved before prefilling
            self._step.cache.share_prompt(request.region, len(request.job.prompt))
        return logits

    def _next_chunk(self, request: ActiveRequest, *, first_row: int) -> PrefillChunk:
        """Cut at multiples of the chunk size, independently of batch-mates."""
        assert request.region is not None  # noqa: S101 - reserved before prefilling
        start = request.num_read
        end = min(start + self._chunk_tokens, len(request.unread_tokens))
        return PrefillChunk(
            first_row=first_row,
            region=request.region,
            sequence=request.rereads[0].number if request.rereads else 0,
            start=start,
            num_tokens=end - start,
        )


def _rows_of(request: ActiveRequest, chunk: PrefillChunk) -> SequenceRows:
    """A chunk of a sequence with images."""
    return SequenceRows(
        tokens=request.unread_tokens,
        images=request.job.images,
        start=chunk.start,
        rows=np.arange(chunk.first_row, chunk.first_row + chunk.num_tokens),
    )


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
