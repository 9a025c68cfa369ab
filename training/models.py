"""Runs and their saved states: snapshots for recovery, checkpoints for users."""

from __future__ import annotations

import secrets
from typing import Any, ClassVar

from django.conf import settings
from django.db import models
from django.db.models import F, Q
from django.utils import timezone

from training.page_models import (
    ClientMetrics,
    CountedHour,
    DailyUsage,
    RenderedData,
    Rollout,
    SampledStep,
    Vocabulary,
)
from training.paths import TinkerPath
from training.session_models import (
    AuditEvent,
    CustomLoss,
    RecordedSample,
    SamplingSession,
    Session,
    new_session_id,
)

__all__ = [
    "AuditEvent",
    "Checkpoint",
    "ClientMetrics",
    "CountedHour",
    "CustomLoss",
    "DailyUsage",
    "Installation",
    "RecordedSample",
    "RenderedData",
    "Rollout",
    "Run",
    "RunQuerySet",
    "SampledStep",
    "SamplingSession",
    "Session",
    "Snapshot",
    "Vocabulary",
    "new_run_id",
    "new_session_id",
]


def new_run_id() -> str:
    """``run_`` and 32 hex digits (128 random bits)."""
    return f"run_{secrets.token_hex(16)}"


class RunQuerySet(models.QuerySet["Run"]):
    def owned_by(self, owner_id: int) -> RunQuerySet:
        return self.filter(owner_id=owner_id)

    def live(self) -> RunQuerySet:
        """Neither removed nor failed; such a run occupies its name."""
        return self.filter(deleted_at__isnull=True)


def _name_in(metadata: Any) -> str:
    """The ``name`` in a client's metadata, or an empty text."""
    named = metadata.get("name") if isinstance(metadata, dict) else None
    return named.strip() if isinstance(named, str) else ""


class Run(models.Model):
    """One adapter and its history. Its id is its lane's id: the run is the log of that lane."""

    FINISHED = "finished"
    """Shown in place of ``ready`` after the run's session has ended; no row has it."""

    class RunState(models.TextChoices):
        CREATING = "creating"
        READY = "ready"
        FAILED = "failed"
        """Its adapter could not be made; it is removed, and its name is free. A trigger sets it
        in the transaction in which its creation fails or is cancelled, in any process."""
        DELETED = "deleted"

    id = models.CharField(primary_key=True, max_length=200, default=new_run_id)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT)
    name = models.CharField(max_length=200)
    """The client's ``model_id``: unique among its owner's live runs, and free again afterwards."""
    session = models.ForeignKey(
        Session, null=True, blank=True, on_delete=models.PROTECT, related_name="runs"
    )
    """The SDK process that made it; None for the quick reference's."""
    model_seq_id = models.BigIntegerField(null=True, blank=True)
    """The SDK's number of the model within its session."""
    base_model = models.CharField(max_length=255)
    rank = models.IntegerField()
    alpha = models.FloatField()
    seed = models.BigIntegerField()
    train_mlp = models.BooleanField(default=True)
    train_attn = models.BooleanField(default=True)
    train_unembed = models.BooleanField(default=True)
    target_modules = models.JSONField(null=True, blank=True)
    """A list of module names, or None for the modules of the train_ flags."""
    share_across_experts = models.BooleanField(default=True, db_default=True)
    """Whether experts share the matrices at the side of the hidden states; see ``LoraConfig``."""

    state = models.CharField(max_length=10, choices=RunState.choices, default=RunState.CREATING)
    error = models.TextField(blank=True, default="")
    """Why its adapter could not be made; the run may have been removed earlier."""
    step = models.IntegerField(default=0)
    """Optimizer steps committed."""
    applied_seq_id = models.BigIntegerField(default=0)
    """Highest seq id whose effect is committed; replay ends there."""
    tokens = models.BigIntegerField(default=0)
    """Tokens trained on."""
    own_objective = models.BooleanField(default=False, db_default=False)
    """Trained with stable_reinforce, which here is not the hosted service's objective."""
    user_metadata = models.JSONField(default=dict, blank=True)
    title = models.CharField(max_length=200, blank=True, default="", db_default="")
    """Set by a person in the console; not part of the API."""
    tags = models.CharField(max_length=500, blank=True, default="", db_default="")
    """Words for finding the run, separated by commas; also set in the console."""
    notes = models.TextField(blank=True, default="", db_default="")
    replay_of = models.ForeignKey("self", null=True, blank=True, on_delete=models.SET_NULL)
    """The run whose log this one was rebuilt from."""
    created_at = models.DateTimeField(default=timezone.now)
    last_request_at = models.DateTimeField(default=timezone.now)
    deleted_at = models.DateTimeField(null=True, blank=True)

    objects = RunQuerySet.as_manager()

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["owner", "name"],
                condition=Q(deleted_at__isnull=True),
                name="run_name_taken_while_live",
            ),
            models.UniqueConstraint(
                fields=["session", "model_seq_id"], name="run_session_model_seq_id"
            ),
            models.CheckConstraint(
                condition=Q(session__isnull=True, model_seq_id__isnull=True)
                | Q(session__isnull=False, model_seq_id__isnull=False),
                name="run_model_seq_id_iff_session",
            ),
            models.CheckConstraint(
                condition=Q(state__in=["creating", "ready", "failed", "deleted"]),
                name="run_state_known",
            ),
            models.CheckConstraint(
                condition=Q(state__in=["failed", "deleted"], deleted_at__isnull=False)
                | Q(state__in=["creating", "ready"], deleted_at__isnull=True),
                name="run_gone_iff_deleted_at",
            ),
            models.CheckConstraint(
                condition=(Q(state="failed") & ~Q(error=""))
                | Q(state="deleted")
                | Q(state__in=["creating", "ready"], error=""),
                name="run_failed_iff_error",
            ),
        ]
        indexes: ClassVar = [
            models.Index(fields=["owner", "-created_at"], name="run_newest_by_owner"),
        ]

    def __str__(self) -> str:
        return self.title or _name_in(self.user_metadata) or self.name

    @property
    def shown_title(self) -> str:
        """The run's name for people.

        It is the title, else ``name`` in the run's metadata, else its ``model_id`` if a person
        chose that. The SDK generates ids, so its runs have the name or display name of their
        session, else owner and date. Reads owner and session.
        """
        if self.session is None or str(self) != self.name:
            return str(self)
        created = timezone.localtime(self.created_at)
        shown = (
            _name_in(self.session.user_metadata)
            or self.session.display_name
            or f"{self.owner}, {created:%d %b %H:%M}"
        )
        return f"{shown} · {self.model_seq_id}" if self.model_seq_id else shown

    @property
    def shown_state(self) -> str:
        """The state, or ``finished`` if the run can only be removed."""
        is_over = self.session is not None and self.session.finished_at is not None
        return self.FINISHED if is_over and self.state == self.RunState.READY else self.state


class Installation(models.Model):
    """This database's identity: one row. The bucket that keeps its files has the same id."""

    id = models.SmallIntegerField(primary_key=True, default=1)
    storage_id = models.CharField(max_length=64)

    class Meta:
        constraints: ClassVar = [
            models.CheckConstraint(condition=Q(id=1), name="installation_is_one"),
        ]

    def __str__(self) -> str:
        return self.storage_id


class Snapshot(models.Model):
    """A run's complete state at one point of its log, for the server's own use."""

    run = models.ForeignKey(Run, on_delete=models.CASCADE, related_name="snapshots")
    seq_id = models.BigIntegerField()
    """The last request whose effect it contains."""
    step = models.IntegerField()
    directory = models.CharField(max_length=300)
    """Relative to the data folder."""
    size_bytes = models.BigIntegerField()
    write_seconds = models.FloatField()
    epoch = models.BigIntegerField()
    """The worker life that wrote it."""
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["run", "seq_id"], name="snapshot_run_seq_id"),
        ]

    def __str__(self) -> str:
        return f"snapshot of {self.run_id} at {self.seq_id}"


class Checkpoint(models.Model):
    """A run's state that its owner saved, under a name and a tinker:// path."""

    class Kind(models.TextChoices):
        TRAINING = "training"
        """With optimizer state; training can continue from it."""
        SAMPLER = "sampler"
        """Weights to sample from."""
        EXTERNAL = "external"
        """Files for other programs, in peft's format."""

    run = models.ForeignKey(Run, on_delete=models.PROTECT, related_name="checkpoints")
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    """The run's owner, repeated because a path is unique among its owner's."""
    path_run = models.CharField(max_length=200)
    """The run's name, as the part of the owner's path. A removed run's checkpoint
    keeps its path, even if another run takes the name."""
    kind = models.CharField(max_length=10, choices=Kind.choices)
    ephemeral = models.BooleanField(default=False)
    """Made for one sampling session, or holds the files of an import until it is finished; not
    listed."""
    name = models.CharField(max_length=200)
    seq_id = models.BigIntegerField()
    """The save request that made it."""
    step = models.IntegerField()
    directory = models.CharField(max_length=300)
    """Relative to the data folder."""
    size_bytes = models.BigIntegerField()
    user_metadata = models.JSONField(default=dict, blank=True)
    public = models.BooleanField(default=False)
    created_at = models.DateTimeField(default=timezone.now)
    expires_at = models.DateTimeField(null=True, blank=True)
    """None: kept until deleted."""

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["run", "kind", "name"], name="checkpoint_run_kind_name"
            ),
            models.UniqueConstraint(
                fields=["owner", "path_run", "kind", "name"],
                condition=Q(ephemeral=False),
                name="checkpoint_path_means_one",
            ),
            models.CheckConstraint(
                condition=Q(kind__in=["training", "sampler", "external"]),
                name="checkpoint_kind_known",
            ),
            models.CheckConstraint(
                condition=Q(expires_at__isnull=True) | Q(expires_at__gt=F("created_at")),
                name="checkpoint_expires_later",
            ),
        ]

    def __str__(self) -> str:
        return str(self.path)

    @property
    def path(self) -> TinkerPath:
        """The path for its owner's clients, unique among the owner's checkpoints."""
        return TinkerPath(self.path_run, self.kind, self.name)

    @property
    def global_path(self) -> TinkerPath:
        """The path for everybody, once it is published: below its run's id."""
        return TinkerPath(self.run_id, self.kind, self.name)

    @property
    def has_expired(self) -> bool:
        """Whether it has expired: it is not found any more and will be deleted."""
        return self.expires_at is not None and self.expires_at <= timezone.now()
