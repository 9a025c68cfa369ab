"""Sessions of the SDK's clients, what belongs to them, and who read others' objects."""

from __future__ import annotations

import secrets
from typing import ClassVar

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.utils import timezone


def new_session_id() -> str:
    """32 hex digits (128 random bits): run ids contain it, so no ``:`` and no ``/``."""
    return secrets.token_hex(16)


class Session(models.Model):
    """One SDK process, which keeps itself alive by heartbeats."""

    class FinishReason(models.TextChoices):
        SUCCESS = "success"
        ERRORED = "errored"
        INTERRUPTED = "interrupted"

    id = models.CharField(primary_key=True, max_length=64, default=new_session_id)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT)
    sdk_version = models.CharField(max_length=40)
    tags = models.JSONField(default=list, blank=True)
    user_metadata = models.JSONField(default=dict, blank=True)
    project_id = models.CharField(max_length=200, blank=True, default="")
    display_name = models.CharField(max_length=200, blank=True, default="")
    created_at = models.DateTimeField(default=timezone.now)
    heartbeat_at = models.DateTimeField(default=timezone.now)
    finished_at = models.DateTimeField(null=True, blank=True)
    finish_reason = models.CharField(
        max_length=12, choices=FinishReason.choices, blank=True, default=""
    )
    """The first reason given; later ones change nothing."""
    finish_detail = models.TextField(blank=True, default="")

    class Meta:
        constraints: ClassVar = [
            models.CheckConstraint(
                condition=Q(finished_at__isnull=True, finish_reason="")
                | (
                    Q(finished_at__isnull=False)
                    & Q(finish_reason__in=["success", "errored", "interrupted"])
                ),
                name="session_finished_iff_reason",
            ),
        ]
        indexes: ClassVar = [
            models.Index(fields=["owner", "-created_at"], name="session_newest_by_owner"),
        ]

    def __str__(self) -> str:
        return self.id


class SamplingSession(models.Model):
    """A fixed base model or checkpoint to sample from; its id is a lane without an order."""

    id = models.CharField(primary_key=True, max_length=120)
    """``<session>:sample:<seq id>``."""
    session = models.ForeignKey(Session, on_delete=models.PROTECT, related_name="sampling_sessions")
    seq_id = models.BigIntegerField()
    """The SDK's number, shared by its two ways to create one."""
    base_model = models.CharField(max_length=255)
    checkpoint = models.ForeignKey(
        "training.Checkpoint", null=True, blank=True, on_delete=models.SET_NULL
    )
    model_path = models.CharField(max_length=500, blank=True, default="")
    """The checkpoint's tinker:// path, kept for people after the checkpoint is deleted; empty for
    the base model."""
    num_clients = models.IntegerField(default=1)
    """Clients that joined; the next one's number."""
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["session", "seq_id"], name="sampling_session_seq_id"),
        ]

    def __str__(self) -> str:
        return self.id


class CustomLoss(models.Model):
    """A loss function that a client traced and uploaded, as a graph of allowed operations."""

    session = models.ForeignKey(Session, on_delete=models.CASCADE, related_name="custom_losses")
    seq_id = models.BigIntegerField()
    name = models.CharField(max_length=200)
    inputs = models.JSONField()
    """Names and ranks of its inputs, in order; the first is ``logprobs``."""
    graph = models.JSONField()
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["session", "seq_id"], name="custom_loss_seq_id"),
        ]

    def __str__(self) -> str:
        return self.name


class RecordedSample(models.Model):
    """The result of one sample request of the SDK, kept for a while so that the loss
    stable_reinforce can refer to its sequences. One row for all sequences, which share the
    prompt."""

    request_id = models.CharField(primary_key=True, max_length=39)
    """The sample's future; a sequence is ``<request id>-<number>``."""
    session = models.ForeignKey(Session, on_delete=models.CASCADE, related_name="+")
    """Only its models may be trained on it."""
    num_tokens = models.BigIntegerField()
    """Tokens of the prompt and all sequences."""
    data = models.BinaryField()
    """``prompt``, and the sequences' ``tokens`` and ``logprobs`` (``futures.payload``)."""
    expires_at = models.DateTimeField(db_index=True)

    def __str__(self) -> str:
        return f"samples of {self.request_id}"


class AuditEvent(models.Model):
    """An audited action. Rows are only added: the database refuses changes and deletions."""

    created_at = models.DateTimeField(default=timezone.now, db_index=True)
    actor = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.PROTECT, related_name="+"
    )
    """None: somebody at the server's console."""
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, blank=True, on_delete=models.PROTECT, related_name="+"
    )
    """The owner of the object."""
    event = models.CharField(max_length=60)
    """``<thing>_<verb>``, such as ``checkpoint_delete``."""
    details = models.JSONField(default=dict, blank=True)

    class Meta:
        indexes: ClassVar = [
            models.Index(fields=["owner", "-created_at"], name="audit_newest_by_owner"),
        ]

    def __str__(self) -> str:
        return f"{self.event} at {self.created_at:%Y-%m-%d %H:%M:%S}"
