"""The packed decode pass: reads the newest token of every active sequence, one row each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from training.engine.sampler.model_runner import Row
from training.engine.sampler.model_step import ModelStep
from training.engine.sampler.row_padding import RowPadding
from training.engine.sampler.sequence import ActiveRequest
from training.engine.torch.attention.paged import PagedAttention
from training.engine.torch.attention.paged_parts import Part
from training.engine.torch.packing.stream import Segment


def decode(step: ModelStep, requests: Sequence[ActiveRequest]) -> tuple[list[Row], Tensor]:
    """The decodable sequences of the requests, which have a place for their newest token, and the
    logits (n, V) of the next token of each."""
    rows, segments = rows_by_weights(step.padding, requests)
    team = step.base_model.holder.team
    attention = PagedAttention(step.cache, _parts(rows), len(rows), team=team)
    tokens = [0 if row is None else row[1].tokens[-1] for row in rows]
    lengths = [1 if row is None else row[0].length(row[1]) for row in rows]
    skipped = [0 if row is None else row[0].skipped_positions for row in rows]
    positions = [length - 1 + more for length, more in zip(lengths, skipped, strict=True)]
    hidden = step.hidden_states(tokens, positions, segments, attention, lengths)  # (T, H)
    logits = step.base_model.logits(hidden, segments)  # (T, V)
    if attention.real_rows is not None:
        logits = logits[attention.real_rows]
    return [row for row in rows if row is not None], logits


def rows_by_weights(
    padding: RowPadding, requests: Sequence[ActiveRequest]
) -> tuple[list[Row | None], list[Segment]]:
    """The decodable sequences as rows of a pass, None for padding, and the adapters of the
    rows."""
    rows: list[Row | None] = []
    segments: list[Segment] = []
    groups = _by_weights(requests)
    for sharing in groups:
        start = len(rows)
        rows += [(request, s) for request in sharing for s in request.decodable()]
        rows += [None] * padding.of_segment(len(rows) - start, among=len(groups))
        segments.append(Segment(start=start, end=len(rows), weights=sharing[0].weights))
    rows += [None] * padding.fill(segments)
    return rows, segments


def _by_weights(requests: Sequence[ActiveRequest]) -> list[list[ActiveRequest]]:
    """Group requests by weights, otherwise in the order in which they started.

    Versions of one run between which its weights did not change share the same tensors.
    """
    sharing: dict[int, list[ActiveRequest]] = {}
    for request in requests:
        sharing.setdefault(id(request.weights), []).append(request)
    return list(sharing.values())


def _parts(rows: Sequence[Row | None]) -> list[Part]:
    parts = []
    for index, row in enumerate(rows):
        if row is not None:
            request, sequence = row
            assert sequence.table is not None  # noqa: S101 - otherwise it is not decodable
            parts.append(
                Part(
                    first_row=index,
                    start=request.length(sequence) - 1,
                    num_tokens=1,
                    blocks=sequence.table.blocks,
                )
            )
    return parts
