"""API keys, of which only a hash is stored, and failed logins to the admin, which delay
the next ones."""

from __future__ import annotations

from django.conf import settings
from django.db import models
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
