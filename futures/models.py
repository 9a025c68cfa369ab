"""The rows that hold the truth: futures, the lanes that order them, the workers that run them.

Queue entries and notifications may be lost; a row may not. Every move between states is a
compare-and-set (``futures.transitions``), and check constraints tie the columns to the state.
This app knows nothing of training: for it a kind is a word and a payload is bytes.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, ClassVar

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.utils import timezone
from django.utils.functional import cached_property

from futures.transitions import FINAL_STATES, Category, State
from futures.worker_lock import WorkerLock

LARGE = 10**15
"""Larger than any count: a larger number in a summary must have been a float."""


def new_request_id() -> str:
    """``future_`` and 32 hex digits (128 random bits)."""
    return f"future_{secrets.token_hex(16)}"


class Lane(models.Model):
    """Futures that are numbered together: those of one run or one sampling session."""

    id = models.CharField(primary_key=True, max_length=200)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT)
    queue = models.CharField(max_length=100)
    """The engine queue whose worker runs this lane."""
    ordered = models.BooleanField(default=True)
    """False for lanes whose seq ids identify requests without ordering them."""
    last_seq_id = models.BigIntegerField(default=0)
    """Highest seq id handed out by the server; unused if the client numbers its requests."""
    next_seq_id = models.BigIntegerField(default=1)
    """Where the next claim of an ordered lane begins; every lower one is claimed or final."""
    worker = models.ForeignKey(
        "Worker", null=True, blank=True, on_delete=models.PROTECT, db_index=False, related_name="+"
    )
    """The epoch to which an ordered lane is leased (``futures.leases``); None: it is free."""

    class Meta:
        indexes: ClassVar = [
            # A claim looks for the lanes of its worker; most lanes are free.
            models.Index(fields=["worker"], condition=Q(worker__isnull=False), name="lane_leased"),
        ]
        constraints: ClassVar = [
            models.CheckConstraint(
                condition=Q(worker__isnull=True) | Q(ordered=True), name="lane_leased_if_ordered"
            ),
        ]

    def __str__(self) -> str:
        return self.id


class Worker(models.Model):
    """One life of one worker process; its id is the epoch that fences its commits."""

    class WorkerState(models.TextChoices):
        STARTING = "starting"
        LIVE = "live"
        STOPPED = "stopped"
        LOST = "lost"

    queue = models.CharField(max_length=100)
    state = models.CharField(
        max_length=10, choices=WorkerState.choices, default=WorkerState.STARTING
    )
    hostname = models.CharField(max_length=255)
    pid = models.IntegerField()
    started_at = models.DateTimeField(default=timezone.now)
    heartbeat_at = models.DateTimeField(default=timezone.now)
    stopped_at = models.DateTimeField(null=True, blank=True)
    figures = models.JSONField(default=dict, blank=True)
    """What the worker reports: base model, device, memory, resident adapters,
    ``futures_per_second`` (``futures.queue_positions`` reads it)."""
    lock: WorkerLock | None = None
    """The advisory lock, only in the worker's own process; not a column."""
    owners_served: Sequence[int] = ()
    """Owners whose futures this process claimed, the least recently served first; not a column."""
    more_waits: bool = False
    """Whether this process's last claim left any future that it may run, now or after the
    futures that it holds; not a column."""
    left_to_others: bool = False
    """Whether this process's last claim left futures to other workers, which this one may take
    after ``futures.claiming.PATIENCE_SECONDS``; not a column."""

    class Meta:
        constraints: ClassVar = [
            models.CheckConstraint(
                condition=Q(state__in=["starting", "live", "stopped", "lost"]),
                name="worker_state_known",
            ),
        ]
        indexes: ClassVar = [
            # Each claim reads how many workers share the queue.
            models.Index(
                fields=["queue"], condition=Q(state__in=["starting", "live"]), name="worker_open"
            ),
        ]

    def __str__(self) -> str:
        return f"worker {self.pk} ({self.queue})"

    @cached_property
    def leases(self) -> set[str]:
        """The lanes that this process's claims have leased; not a column."""
        return set()


class FutureQuerySet(models.QuerySet["Future"]):
    def owned_by(self, owner_id: int) -> FutureQuerySet:
        return self.filter(owner_id=owner_id)

    def open(self) -> FutureQuerySet:
        """Not final."""
        return self.filter(state__in=[State.PENDING, State.RUNNING])

    def cancellable(self) -> FutureQuerySet:
        """Not begun, or interruptible and not final."""
        return self.filter(Q(state=State.PENDING) | Q(state=State.RUNNING, interruptible=True))

    def without_bodies(self) -> FutureQuerySet:
        """For lists: payload and result stay in the database."""
        return self.defer("payload", "result")


class Future(models.Model):
    """The durable promise of one request."""

    id = models.CharField(primary_key=True, max_length=39, default=new_request_id)
    """The request id that clients know."""
    # No separate index for the foreign keys: every submit, claim and finish would write it,
    # and the constraints and partial indexes below serve all queries.
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, db_index=False)
    queue = models.CharField(max_length=100)
    lane = models.ForeignKey(Lane, null=True, blank=True, on_delete=models.PROTECT, db_index=False)
    """None: may run at any time, beside any other future."""
    seq_id = models.BigIntegerField(null=True, blank=True)
    """Order number in the lane; used even if the request is refused."""
    idempotency_key = models.CharField(max_length=200, null=True, blank=True)  # noqa: DJ001
    """The client's key for sending the request again; unique per owner."""
    kind = models.CharField(max_length=40)
    state = models.CharField(max_length=10, choices=State.choices, default=State.PENDING)

    payload = models.BinaryField(null=True)
    """msgpack in zstd (``futures.payload``); None once pruned."""
    payload_digest = models.BinaryField(max_length=32)
    """SHA-256 of kind and uncompressed payload: tells a repeat from a reused number."""
    result = models.BinaryField(null=True)
    """Like payload; None until ready, and again once pruned."""
    summary = models.JSONField(default=dict, blank=True)
    """A few small facts for lists and charts: datums, tokens, loss."""
    cost = models.IntegerField(default=1)
    """Estimated work in tokens; a claim takes futures up to a budget of it."""
    delayable = models.BooleanField(default=False)
    """No client waits for the result: a worker may delay it a moment for batch-mates."""
    interruptible = models.BooleanField(default=False)
    """It changes nothing but its own result, so its owner may cancel it while it runs."""

    error = models.TextField(blank=True, default="")
    category = models.CharField(max_length=10, choices=Category.choices, blank=True, default="")
    error_code = models.CharField(max_length=60, blank=True, default="")
    """Class name of the domain error."""
    attempts = models.SmallIntegerField(default=0)
    """Workers that crashed while it ran. After one crash it runs alone; the third crash
    while it runs alone fails it."""
    interruptions = models.SmallIntegerField(default=0, db_default=0)
    """Workers that were ended from outside while it ran. The cause is probably not this future, but
    a future that ends the whole machine looks the same, so from the third on it runs alone, and the
    tenth fails it."""
    worker = models.ForeignKey(
        Worker, null=True, blank=True, on_delete=models.PROTECT, db_index=False
    )
    """The epoch that runs or ran it."""
    batch = models.BigIntegerField(null=True, blank=True)
    """Number, within the worker's life, of the engine batch that computed it."""
    replay_of = models.ForeignKey(
        "self", null=True, blank=True, on_delete=models.SET_NULL, db_index=False
    )
    """The future whose request this one submits again."""

    created_at = models.DateTimeField(default=timezone.now)
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)
    pruned_at = models.DateTimeField(null=True, blank=True)
    """When the retention policy deleted payload and result."""

    objects = FutureQuerySet.as_manager()

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["lane", "seq_id"], name="future_lane_seq_id"),
            models.UniqueConstraint(
                fields=["owner", "idempotency_key"], name="future_idempotency_key"
            ),
            models.CheckConstraint(
                condition=Q(lane__isnull=True, seq_id__isnull=True)
                | Q(lane__isnull=False, seq_id__isnull=False),
                name="future_seq_id_iff_lane",
            ),
            # An ordered lane begins at 1; a lower number would wait forever.
            models.CheckConstraint(
                condition=Q(seq_id__isnull=True) | Q(seq_id__gte=0), name="future_seq_id_from_0"
            ),
            models.CheckConstraint(condition=Q(cost__gte=0), name="future_cost_from_0"),
            models.CheckConstraint(
                condition=Q(state__in=[str(s) for s in State]), name="future_state_known"
            ),
            models.CheckConstraint(
                condition=~Q(state=State.RUNNING)
                | Q(worker__isnull=False, started_at__isnull=False),
                name="future_running_has_worker",
            ),
            models.CheckConstraint(
                condition=~Q(state=State.PENDING) | Q(worker__isnull=True, payload__isnull=False),
                name="future_pending_can_run",
            ),
            models.CheckConstraint(
                condition=~Q(state=State.READY)
                | Q(result__isnull=False)
                | Q(pruned_at__isnull=False),
                name="future_ready_has_result",
            ),
            models.CheckConstraint(
                condition=(Q(state=State.FAILED) & ~Q(error="") & ~Q(category=""))
                | (~Q(state=State.FAILED) & Q(error="", category="")),
                name="future_failed_iff_error",
            ),
            # Only an interruptible future may be cancelled while it runs.
            models.CheckConstraint(
                condition=~Q(state=State.CANCELLED)
                | Q(worker__isnull=True)
                | Q(interruptible=True),
                name="future_interrupted_if_it_may_be",
            ),
            models.CheckConstraint(
                condition=Q(state__in=FINAL_STATES, finished_at__isnull=False)
                | Q(state__in=[State.PENDING, State.RUNNING], finished_at__isnull=True),
                name="future_final_iff_finished_at",
            ),
        ]
        indexes: ClassVar = [
            # The claim looks for lanes with pending futures.
            models.Index(
                fields=["queue", "lane", "seq_id"],
                condition=Q(state=State.PENDING),
                name="future_pending_by_lane",
            ),
            # And for futures without a lane, oldest first, for each owner.
            models.Index(
                fields=["queue", "owner", "created_at"],
                condition=Q(state=State.PENDING, lane__isnull=True),
                name="future_pending_no_lane",
            ),
            # Recovery and the fence look for the futures that an epoch holds.
            models.Index(
                fields=["worker"], condition=Q(state=State.RUNNING), name="future_running"
            ),
            # The per-user limit counts pending futures.
            models.Index(
                fields=["owner"], condition=Q(state=State.PENDING), name="future_pending_by_owner"
            ),
            # A queue position counts older open futures.
            models.Index(
                fields=["queue", "created_at"],
                condition=Q(state__in=[State.PENDING, State.RUNNING]),
                name="future_open",
            ),
            models.Index(fields=["-created_at"], name="future_newest"),
            # Lists of failures; there are few among many.
            models.Index(
                fields=["-created_at"], condition=Q(state=State.FAILED), name="future_failed"
            ),
        ]

    def __str__(self) -> str:
        return self.id

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES

    @property
    def summary_line(self) -> str:
        """The summary as ``name value`` pairs, for lists."""
        return "  ".join(f"{name} {_short(value)}" for name, value in self.summary.items())


def _short(value: Any) -> str:
    """A float in four digits; Postgres stores a large float as an integer."""
    is_large = isinstance(value, int) and abs(value) >= LARGE
    return f"{value:.4g}" if isinstance(value, float) or is_large else str(value)
