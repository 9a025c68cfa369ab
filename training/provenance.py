"""Turns spans of sampled sequences into the arrays that a loss reads, checking every token.

This happens when a request is accepted, so the worker's input, and that of a replay,
does not depend on the records. Numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.errors import InvalidDatum
from training.loss_fns import ADVANTAGES, TARGET_TOKENS
from training.types import Datum, Provenance, ProvenanceSpan, RecordedSequence

Records = Mapping[str, RecordedSequence]


def with_recorded_logprobs(
    datum: Datum, provenance: Provenance | None, records: Records, where: str
) -> Datum:
    """The datum with the recorded log-probability of each sampled target as its ``logprobs``.

    They replace the client's values of that name; a target that was not sampled gets 0, and
    must have no advantage. Such targets are not compared, because clients fill them with any value.

    Args:
        records: The available sequences, by id.
        where: The datum, such as ``data[3]``.

    Raises:
        InvalidDatum: The spans do not cover their fields, name unrecorded sequences, or the tokens
            differ from the recorded ones. (400)
    """
    if provenance is None:
        raise InvalidDatum(
            f"{where}.model_input_spans: missing; say from which samples the tokens come "
            "(Datum.with_provenance)"
        )
    targets, advantages = _inputs(datum, where)
    place = f"{where}.model_input_spans"
    for start, span, sequence in _tiles(
        provenance.model_input, len(datum.model_input), records, place
    ):
        _compare(datum.model_input, start, span, sequence, f"{where}.model_input")
    logprobs = np.zeros(len(targets), np.float32)
    is_sampled = np.zeros(len(targets), np.bool_)
    place = f"{where}.loss_fn_input_spans"
    for start, span, sequence in _tiles(provenance.loss_fn_inputs, len(targets), records, place):
        if span.is_sampled:
            _compare(targets, start, span, sequence, f"{where}.loss_fn_inputs.{TARGET_TOKENS}")
            own = slice(start, start + span.length)
            logprobs[own] = sequence.logprobs[span.offset : span.offset + span.length]
            is_sampled[own] = True
    is_wrong = (advantages != 0) & ~is_sampled
    if is_wrong.any():
        index = int(is_wrong.argmax())
        raise InvalidDatum(
            f"{where}.loss_fn_inputs.{ADVANTAGES}[{index}]: {advantages[index]:g} at a token of a "
            "prompt; only sampled tokens may have an advantage other than 0"
        )
    inputs = {**datum.loss_fn_inputs, "logprobs": logprobs}
    return Datum(model_input=datum.model_input, loss_fn_inputs=inputs)


def sequences_named(provenance: Provenance | None) -> set[str]:
    """The sequence ids in the spans."""
    if provenance is None:
        return set()
    return {span.sequence_id for span in (*provenance.model_input, *provenance.loss_fn_inputs)}


def _inputs(datum: Datum, where: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """(N,) target tokens and (N,) advantages."""
    num_tokens = len(datum.model_input)
    for name in (TARGET_TOKENS, ADVANTAGES):
        place = f"{where}.loss_fn_inputs.{name}"
        if name not in datum.loss_fn_inputs:
            raise InvalidDatum(f"{place}: missing, and stable_reinforce needs it")
        shape = datum.loss_fn_inputs[name].shape
        if shape != (num_tokens,):
            raise InvalidDatum(f"{place}: shape {list(shape)} instead of [{num_tokens}]")
    return datum.loss_fn_inputs[TARGET_TOKENS], datum.loss_fn_inputs[ADVANTAGES]


def _tiles(
    spans: Sequence[ProvenanceSpan], num_positions: int, records: Records, where: str
) -> list[tuple[int, ProvenanceSpan, RecordedSequence]]:
    """Each span that is not empty with its first position and its sequence."""
    covered = sum(span.length for span in spans)
    if covered != num_positions:
        raise InvalidDatum(
            f"{where}: the spans cover {covered} positions of {num_positions}; they must tile them"
        )
    tiles = []
    start = 0
    for index, span in enumerate(spans):
        place = f"{where}[{index}]"
        sequence = records.get(span.sequence_id)
        if sequence is None:
            raise InvalidDatum(
                f"{place}.sequence_id: no sequence {span.sequence_id[:80]!r} is recorded in this "
                "session; sequences are recorded if they are sampled with record_stability_info, "
                "until a day after they were last used"
            )
        source = sequence.tokens if span.is_sampled else sequence.prompt
        if span.offset + span.length > len(source):
            raise InvalidDatum(
                f"{place}: positions {span.offset} to {span.offset + span.length} of "
                f"{len(source)} {_kind(span)} tokens"
            )
        if span.length:
            tiles.append((start, span, sequence))
        start += span.length
    return tiles


def _compare(
    tokens: NDArray[Any],
    start: int,
    span: ProvenanceSpan,
    sequence: RecordedSequence,
    where: str,
) -> None:
    source = sequence.tokens if span.is_sampled else sequence.prompt
    recorded = source[span.offset : span.offset + span.length]
    differs = tokens[start : start + span.length] != recorded
    if differs.any():
        index = int(differs.argmax())
        raise InvalidDatum(
            f"{where}[{start + index}]: token {tokens[start + index]}, and the recorded "
            f"{_kind(span)} token of {span.sequence_id[:80]!r} is {recorded[index]}"
        )


def _kind(span: ProvenanceSpan) -> str:
    return "sampled" if span.is_sampled else "prompt"
