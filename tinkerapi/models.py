"""API keys, of which only a hash is stored; failed logins to the admin, which delay
the next ones; and events on their way to the operator's webhook."""

from __future__ import annotations

import secrets
from typing import ClassVar

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.utils import timezone


class ApiKey(models.Model):
    """A user's credential for the API."""

    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="api_keys"
    )
    name = models.CharField(max_length=100)
    prefix = models.CharField(max_length=12)
    """The first characters, so that people can distinguish their keys."""
    key_hash = models.CharField(max_length=64, unique=True)
    """SHA-256 of the key. It has 256 random bits, so no salt or stretching is needed."""
    created_at = models.DateTimeField(default=timezone.now)
    expires_at = models.DateTimeField(null=True, blank=True)
    """None: never."""
    lifetime = models.DurationField(null=True, blank=True)
    """For how long it was made, which its successor gets; ``expires_at`` may come earlier, because
    it was replaced. None: without an end."""
    last_used_at = models.DateTimeField(null=True, blank=True)
    """To the minute; writing it at every request would cost more than the request."""
    revoked_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        verbose_name = "API key"

    def __str__(self) -> str:
        return f"{self.prefix}… ({self.name})"

    @property
    def is_valid(self) -> bool:
        """Whether it is usable now: not revoked, not expired, of an active user."""
        is_current = self.expires_at is None or self.expires_at > timezone.now()
        return self.revoked_at is None and is_current and self.user.is_active


class FailedLogins(models.Model):
    """Recent failed logins of one user, one address, or one user from one address; deleted after a
    time without failures."""

    key = models.CharField(primary_key=True, max_length=64)
    """A hash of the counted name or address, since people also type passwords as names."""
    failures = models.IntegerField()
    last_at = models.DateTimeField(db_index=True)
    closed_until = models.DateTimeField()
    """Until then no password is checked."""

    class Meta:
        verbose_name_plural = "failed logins"

    def __str__(self) -> str:
        return f"{self.failures} failed logins"


def new_message_id() -> str:
    """``event_`` and 32 hex digits (128 random bits), so also unique beside a restored backup."""
    return f"event_{secrets.token_hex(16)}"


class Delivery(models.Model):
    """One event for the webhook's receiver, from when it was noticed until it was taken."""

    class DeliveryState(models.TextChoices):
        WAITING = "waiting"
        DELIVERED = "delivered"
        GIVEN_UP = "given up"

    class Status(models.TextChoices):
        HAPPENED = "happened"
        BEGAN = "began"
        OVER = "over"

    message_id = models.CharField(max_length=38, unique=True, default=new_message_id)
    """The receiver's key against repeats."""
    key = models.CharField(max_length=300, unique=True)
    """Names the event, so that whoever notices it again stores it once."""
    event = models.CharField(max_length=40)
    """One of ``tinkerapi.config.webhook.EVENTS``."""
    subject = models.CharField(max_length=200, blank=True)
    status = models.CharField(max_length=10, choices=Status.choices)
    text = models.CharField(max_length=1000)
    at = models.DateTimeField()
    """When it happened."""
    created_at = models.DateTimeField(default=timezone.now)
    state = models.CharField(
        max_length=10, choices=DeliveryState.choices, default=DeliveryState.WAITING
    )
    attempts = models.IntegerField(default=0)
    tried_at = models.DateTimeField(null=True, blank=True)
    next_attempt_at = models.DateTimeField(default=timezone.now)
    last_error = models.CharField(max_length=300, blank=True)
    """Why the last attempt failed; empty once one succeeded."""
    finished_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        verbose_name_plural = "deliveries"
        indexes: ClassVar = [
            models.Index(
                fields=["next_attempt_at"], condition=Q(state="waiting"), name="delivery_due"
            ),
            models.Index(fields=["event", "subject"], name="delivery_by_event"),
            models.Index(fields=["tried_at"], name="delivery_tried"),
            models.Index(fields=["created_at"], name="delivery_created"),
        ]
        constraints: ClassVar = [
            models.CheckConstraint(
                condition=Q(state="waiting", finished_at__isnull=True)
                | Q(state__in=["delivered", "given up"], finished_at__isnull=False),
                name="delivery_final_iff_finished_at",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.event} {self.message_id}"
