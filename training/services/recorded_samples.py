"""What was sampled for stable_reinforce: recorded, read by those who train on it, forgotten."""

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
"""After the last use."""

RENEWED_AFTER = timedelta(hours=1)
"""A use that comes sooner after another writes nothing."""

MAX_RECORDS = 16_384
"""Sample requests whose sequences one training request may name."""

MAX_RECORDED_TOKENS = 16_000_000
"""Of all of them: eight bytes each while the request is parsed."""

_SEQUENCE_ID = re.compile(r"(future_[0-9a-f]{32})-[0-9]{1,9}")


def stable_reinforce_check() -> None:
    """Whether this server takes part in stable_reinforce.

    Raises:
        InvalidRequest: Its operator has switched it off. (400)
    """
    if settings.STABLE_REINFORCE == "refuse":
        raise InvalidRequest(
            f"{STABLE_REINFORCE}: the hosted service's formula is not public, and this server is "
            "set to refuse its own (TINKERAPI_STABLE_REINFORCE)"
        )


def sequence_id(request_id: str, number: int) -> str:
    """By which a client names one of a request's sequences."""
    return f"{request_id}-{number}"


def samples_record(
    *,
    request_id: str,
    session_id: str,
    prompt: TokenIds,
    sequences: Sequence[Mapping[str, Any]],
) -> None:
    """Keep a finished sample; inside the transaction in which its result is committed.

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
    """The datums with the log-probabilities that were recorded for their sampled tokens.

    Only sequences of the model's own session count; another's answers as one that never was.
    Those that are named are kept for another day.

    Raises:
        RunNotFound: (404)
        InvalidRequest: This server refuses the loss. (400)
        InvalidDatum: The spans do not fit, or name what is not recorded. (400)
        LimitExceeded: They name more than can be looked at in one request. (400)
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
    """Those of the named sequences that are recorded in the session, by id."""
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
    """Delete the records whose time is up; say how many. The worker calls it when idle."""
    deleted, _ = RecordedSample.objects.filter(expires_at__lte=timezone.now()).delete()
    return deleted
