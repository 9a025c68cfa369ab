"""The packed decode pass: reads the newest token of every active sequence, one row each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from training.engine.sampler.model_runner import Row
from training.engine.sampler.model_step import ModelStep
from training.engine.sampler.row_padding import RowPadding
from training.engine.sampler.sequence import ActiveRequest
from training.engine.torch.attention.cached import DecodeAttention, DecodeRun
from training.engine.torch.packing.stream import Segment


def decode(step: ModelStep, requests: Sequence[ActiveRequest]) -> tuple[list[Row], Tensor]:
    """The unfinished sequences of the requests, and the logits (n, V) of the next token of each."""
    rows, segments = rows_by_weights(step.padding, requests)
    attention = DecodeAttention(step.cache, _decode_runs(rows), len(rows))
    tokens = [0 if row is None else row[1].tokens[-1] for row in rows]
    newest = [0 if row is None else len(row[0].job.prompt) + len(row[1].tokens) - 1 for row in rows]
    lengths = [number + 1 for number in newest]
    skipped = [0 if row is None else row[0].skipped_positions for row in rows]
    positions = [number + more for number, more in zip(newest, skipped, strict=True)]
    hidden = step.hidden_states(tokens, positions, segments, attention, lengths)  # (T, H)
    logits = step.base_model.logits(hidden, segments)  # (T, V)
    if attention.real_rows is not None:
        logits = logits[attention.real_rows]
    return [row for row in rows if row is not None], logits


def rows_by_weights(
    padding: RowPadding, requests: Sequence[ActiveRequest]
) -> tuple[list[Row | None], list[Segment]]:
    """The unfinished sequences as rows of a pass, None for padding, and the adapters of the
    rows."""
    rows: list[Row | None] = []
    segments: list[Segment] = []
    for sharing in _by_weights(requests):
        start = len(rows)
        rows += [(request, s) for request in sharing for s in request.unfinished()]
        rows += [None] * padding.of_segment(len(rows) - start)
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


def _decode_runs(rows: Sequence[Row | None]) -> list[DecodeRun]:
    """Group rows of one job whose sequences are also adjacent in the cache."""
    neighbours: list[list[tuple[int, Row]]] = []
    for index, row in enumerate(rows):
        if row is None:
            continue
        request, sequence = row
        if neighbours:
            last_index, (last_request, last_sequence) = neighbours[-1][-1]
            if (
                last_index == index - 1
                and last_request is request
                and last_sequence.number == sequence.number - 1
            ):
                neighbours[-1].append((index, row))
                continue
        neighbours.append([(index, row)])
    runs = []
    for together in neighbours:
        index, (request, sequence) = together[0]
        assert request.region is not None  # noqa: S101 - reserved before prefilling
        runs.append(
            DecodeRun(
                first_row=index,
                region=request.region,
                first_sequence=sequence.number,
                count=len(together),
                length=len(request.job.prompt) + len(sequence.tokens),
            )
        )
    return runs
