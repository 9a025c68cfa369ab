"""Records samples for stable_reinforce, reads them for training, and deletes old ones."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.utils import timezone

from futures.payload import decode, encode
from training.errors import InvalidRequest, LimitExceeded
from training.loss_fns import STABLE_REINFORCE
from training.models import RecordedSample
from training.provenance import sequences_named, with_recorded_logprobs
from training.selectors import run_get
from training.types import Datum, Provenance, RecordedSequence, TokenIds

KEPT = timedelta(days=1)
"""Lifetime of a record after its last use."""

RENEWED_AFTER = timedelta(hours=1)
"""A use within this time after another one is not recorded."""

MAX_RECORDS = 16_384
"""Sample requests whose sequences one training request may name."""

MAX_RECORDED_TOKENS = 16_000_000
"""Tokens of all of them: eight bytes each while the request is parsed."""

_SEQUENCE_ID = re.compile(r"(future_[0-9a-f]{32})-[0-9]{1,9}")


def stable_reinforce_check() -> None:
    """Check that this server supports stable_reinforce.

    Raises:
        InvalidRequest: Its operator has switched it off. (400)
    """
    if settings.STABLE_REINFORCE == "refuse":
        raise InvalidRequest(
            f"{STABLE_REINFORCE}: the hosted service's formula is not public, and this server is "
            "set to refuse its own (TINKERAPI_STABLE_REINFORCE)"
        )


def sequence_id(request_id: str, number: int) -> str:
    """The id of one of a request's sequences for clients."""
    return f"{request_id}-{number}"


def samples_record(
    *,
    request_id: str,
    session_id: str,
    prompt: TokenIds,
    sequences: Sequence[Mapping[str, Any]],
) -> None:
    """Record a finished sample, inside the transaction that commits its result.

    Args:
        sequences: Each with ``tokens`` and ``logprobs``.
    """
    kept = [{name: sequence[name] for name in ("tokens", "logprobs")} for sequence in sequences]
    row = RecordedSample(
        request_id=request_id,
        session_id=session_id,
        num_tokens=len(prompt) + sum(len(sequence["tokens"]) for sequence in kept),
        data=encode({"prompt": prompt, "sequences": kept}),
        expires_at=timezone.now() + KEPT,
    )
    RecordedSample.objects.bulk_create([row], ignore_conflicts=True)


def logprobs_resolve(
    *,
    owner_id: int,
    model_id: str,
    data: Sequence[Datum],
    provenance: Sequence[Provenance | None],
) -> list[Datum]:
    """The datums with the recorded log-probabilities of their sampled tokens.

    Only sequences of the model's own session count; another session's do not exist for it.
    The named sequences are kept for another day.

    Raises:
        RunNotFound: (404)
        InvalidRequest: This server refuses the loss. (400)
        InvalidDatum: The spans do not fit, or name a sequence that is not recorded. (400)
        LimitExceeded: They name more than one request may. (400)
    """
    stable_reinforce_check()
    run = run_get(owner_id=owner_id, model_id=model_id)
    named = set().union(*map(sequences_named, provenance))
    records = _records(owner_id, run.session_id, named)
    return [
        with_recorded_logprobs(datum, spans, records, f"data[{index}]")
        for index, (datum, spans) in enumerate(zip(data, provenance, strict=True))
    ]


def _records(
    owner_id: int, session_id: str | None, named: Collection[str]
) -> dict[str, RecordedSequence]:
    """The named sequences that are recorded in the session, by id."""
    # What is no id of ours is not recorded, and what no text of the database can hold is not asked.
    request_ids = {found[1] for name in named if (found := _SEQUENCE_ID.fullmatch(name))}
    if len(request_ids) > MAX_RECORDS:
        raise LimitExceeded(
            f"data: names the sequences of {len(request_ids)} samples; this server takes "
            f"{MAX_RECORDS} in one request"
        )
    now = timezone.now()
    rows = RecordedSample.objects.filter(
        session_id=session_id,
        session__owner_id=owner_id,
        expires_at__gt=now,
        request_id__in=request_ids,
    )
    num_tokens = sum(rows.values_list("num_tokens", flat=True))
    if num_tokens > MAX_RECORDED_TOKENS:
        raise LimitExceeded(
            f"data: the samples that it names have {num_tokens} tokens in all; this server takes "
            f"{MAX_RECORDED_TOKENS} in one request"
        )
    records = {}
    for request_id, data in rows.values_list("request_id", "data"):
        content = decode(bytes(data))
        for number, sequence in enumerate(content["sequences"]):
            name = sequence_id(request_id, number)
            if name in named:
                records[name] = RecordedSequence(prompt=content["prompt"], **sequence)
    rows.filter(expires_at__lt=now + KEPT - RENEWED_AFTER).update(expires_at=now + KEPT)
    return records


def samples_forget() -> int:
    """Delete expired records; return their number. The worker calls it when idle."""
    deleted, _ = RecordedSample.objects.filter(expires_at__lte=timezone.now()).delete()
    return deleted
