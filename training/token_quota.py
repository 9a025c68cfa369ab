"""The tokens that one user may use in a day (``TINKERAPI_USER_TOKENS_PER_DAY``).

Used are the tokens of completed requests of this day, in UTC. Requests that wait or run reserve
what they may use at most: the tokens of their data or prompts, and for samples ``max_tokens`` of
each. For text that the worker has not tokenized yet this is an estimate, so only text may exceed
the limit.

The check and the submission are one transaction, in which one submission of an owner follows the
other, so that requests sent at once cannot exceed the limit together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.conf import settings
from django.db import transaction

from futures.database import execute
from futures.payload import EncodedPayload
from futures.services import future_repeated
from training.errors import TokenQuotaExceeded
from training.kinds import Request
from training.usage import today, tokens_used

RESERVED = "reserved_tokens"
"""In the summary of a request: what it may use, if there is a limit."""

_LOCK = "SELECT pg_advisory_xact_lock(hashtext('tinkerapi token quota'), %(owner_id)s::int)"

# Two statements in one, because each state has a small index of its own.
_RESERVED = """
SELECT coalesce(sum(coalesce((summary->>%(reserved)s)::bigint, cost)), 0) FROM (
    SELECT kind, summary, cost FROM futures_future
    WHERE owner_id = %(owner_id)s AND state = 'pending'
    UNION ALL
    SELECT kind, summary, cost FROM futures_future
    WHERE owner_id = %(owner_id)s AND state = 'running'
) AS open WHERE kind IN ('forward', 'forward_backward', 'sample')
"""


@contextmanager
def token_quota(
    request: Request,
    encoded: EncodedPayload,
    *,
    owner_id: int,
    lane_id: str | None,
    seq_id: int | None,
    idempotency_key: str | None,
) -> Iterator[dict[str, Any]]:
    """Submit the request inside; yields what its summary must have.

    Raises:
        TokenQuotaExceeded: It may exceed the limit, and is no repeat. (403)
    """
    limit = settings.USER_TOKENS_PER_DAY
    needed = request.most_tokens
    if not limit or not needed:
        yield {}
        return
    with transaction.atomic():
        try:
            token_quota_check(owner_id=owner_id, needed=needed)
        except TokenQuotaExceeded:
            if not future_repeated(
                payload=encoded,
                owner_id=owner_id,
                lane_id=lane_id,
                seq_id=seq_id,
                idempotency_key=idempotency_key,
            ):
                raise
        yield {RESERVED: needed}


def token_quota_check(*, owner_id: int, needed: int) -> None:
    """Refuse what may use more tokens than the owner has left today, if there is a limit.

    Call it in the transaction that stores the requests; until its end no other request of the
    owner is admitted.

    Raises:
        TokenQuotaExceeded: (403)
    """
    limit = settings.USER_TOKENS_PER_DAY
    if not limit or not needed:
        return
    execute(_LOCK, {"owner_id": owner_id})
    used = tokens_used(owner_id, today())
    [(reserved,)] = execute(_RESERVED, {"owner_id": owner_id, "reserved": RESERVED})
    if used + int(reserved) + needed > limit:
        raise TokenQuotaExceeded(
            f"this request may use {needed:,} tokens; of the {limit:,} that one user may use "
            f"in a day you have used {used:,}, and your waiting requests may use "
            f"{int(reserved):,}. Send it again after 00:00 UTC, send less data, or set a "
            "smaller max_tokens"
        )
