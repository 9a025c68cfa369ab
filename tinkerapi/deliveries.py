"""The rows of events on their way to the receiver.

Every move is a compare-and-set, so two senders at once send nothing twice. A sender that dies
during an attempt leaves a row that is due again after its pause: a receiver gets each event at
least once, and recognizes a repeat by the message's id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db.models import Count
from django.utils import timezone

from tinkerapi.models import Delivery

FIRST_PAUSE = timedelta(seconds=15)
"""Longer than an attempt, so that no other sender takes an event that is on its way."""
LONGEST_PAUSE = timedelta(hours=1)
GIVE_UP_AFTER = timedelta(days=1)
KEPT = timedelta(days=30)
MOST_WAITING = 100
"""Of one kind of event, so that no kind keeps another from being sent."""

CONNECTED = "webhook_connected"
"""The first event for each receiver; earlier ones are not sent to it."""

MAX_SUBJECT = 200
"""Characters, as the column has."""

Status = Delivery.Status
State = Delivery.DeliveryState


@dataclass(frozen=True, kw_only=True)
class Notice:
    """An event to send."""

    event: str
    subject: str
    """At most ``MAX_SUBJECT`` characters."""
    status: str
    text: str
    at: datetime
    key: str
    """The same for whoever notices the same event."""


def store(notices: Iterable[Notice]) -> int:
    """Store those that are new, and return how many there was no room for."""
    by_key = {notice.key: notice for notice in notices}
    known = set(Delivery.objects.filter(key__in=by_key).values_list("key", flat=True))
    fresh = [notice for key, notice in by_key.items() if key not in known]
    if not fresh:
        return 0
    waiting = Counter(
        dict(
            Delivery.objects.filter(state=State.WAITING)
            .values_list("event")
            .annotate(number=Count("pk"))
        )
    )
    rows = []
    for notice in sorted(fresh, key=lambda notice: notice.at):
        waiting[notice.event] += 1
        if waiting[notice.event] <= MOST_WAITING:
            rows.append(
                Delivery(
                    key=notice.key,
                    event=notice.event,
                    subject=notice.subject,
                    status=notice.status,
                    text=notice.text[:1000],
                    at=notice.at,
                )
            )
    Delivery.objects.bulk_create(rows, ignore_conflicts=True)
    return len(fresh) - len(rows)


def next_due() -> Delivery | None:
    """The event that has been due for longest, marked as tried now; None if none is due."""
    while True:
        now = timezone.now()
        due = Delivery.objects.filter(state=State.WAITING, next_attempt_at__lte=now)
        delivery = due.order_by("next_attempt_at", "pk").first()
        if delivery is None:
            return None
        taken = Delivery.objects.filter(
            pk=delivery.pk, state=State.WAITING, attempts=delivery.attempts
        ).update(
            attempts=delivery.attempts + 1,
            tried_at=now,
            next_attempt_at=now + pause_after(delivery.attempts + 1),
        )
        if taken:  # else another sender took it, and the next look finds another event
            delivery.attempts += 1
            return delivery


def pause_after(attempts: int) -> timedelta:
    """How long an event waits after that many failed attempts."""
    doublings: int = 2 ** min(attempts - 1, 20)  # of which the last ones exceed the longest pause
    return min(LONGEST_PAUSE, FIRST_PAUSE * doublings)


def record_success(delivery: Delivery) -> None:
    """The receiver has taken it."""
    Delivery.objects.filter(pk=delivery.pk, state=State.WAITING).update(
        state=State.DELIVERED, last_error="", finished_at=timezone.now()
    )


def record_failure(delivery: Delivery, error: str) -> None:
    """It did not; after a day of attempts none is made any more."""
    now = timezone.now()
    mine = Delivery.objects.filter(pk=delivery.pk, state=State.WAITING, attempts=delivery.attempts)
    if now - delivery.created_at >= GIVE_UP_AFTER:
        mine.update(state=State.GIVEN_UP, last_error=error[:300], finished_at=now)
    else:
        mine.update(last_error=error[:300])


def forget_old() -> None:
    """Delete the rows of events that were finished, a month after they were stored."""
    old = Delivery.objects.filter(created_at__lt=timezone.now() - KEPT)
    old.exclude(state=State.WAITING).exclude(event=CONNECTED).delete()


def connected_at(receiver: str) -> datetime:
    """Since when events are sent to this receiver; the first call announces it."""
    first, _ = Delivery.objects.get_or_create(
        key=f"{CONNECTED}:{receiver}",
        defaults={
            "event": CONNECTED,
            "subject": receiver,
            "status": Status.HAPPENED,
            "text": "tinkerapi sends its events here from now on",
            "at": timezone.now(),
        },
    )
    return first.created_at


def newest_of(event: str, subject: str) -> Delivery | None:
    """The last row of an event about this subject."""
    return Delivery.objects.filter(event=event, subject=subject).order_by("-pk").first()


def open_subjects(event: str) -> list[str]:
    """The subjects of a problem that has begun and is not over, as far as was stored."""
    rows = Delivery.objects.filter(event=event).order_by("subject", "-pk").distinct("subject")
    return [row.subject for row in rows if row.status == Status.BEGAN]


def last_tried() -> Delivery | None:
    """The event of the last attempt."""
    return Delivery.objects.filter(tried_at__isnull=False).order_by("-tried_at", "-pk").first()


def last_failure() -> Delivery | None:
    """The event of the last attempt, if that failed; an attempt under way has not failed yet."""
    last = last_tried()
    return last if last is not None and last.last_error else None
