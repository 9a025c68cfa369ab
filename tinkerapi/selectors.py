"""Reads of API keys: which key is this, and whose is it?"""

from __future__ import annotations

import hashlib

from django.db.models import Q, QuerySet
from django.utils import timezone

from tinkerapi.models import ApiKey


def api_key_hash(key: str) -> str:
    """SHA-256 of the key as 64 hex digits: what is stored and looked up instead of it."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def api_keys_valid() -> QuerySet[ApiKey]:
    """Keys that open the door now: not revoked, not expired, of an active user."""
    return ApiKey.objects.filter(
        Q(expires_at__isnull=True) | Q(expires_at__gt=timezone.now()),
        revoked_at__isnull=True,
        user__is_active=True,
    )


def api_key_get(key: str) -> ApiKey | None:
    """The valid key with its user loaded, in one query; None for every other string."""
    return api_keys_valid().select_related("user").filter(key_hash=api_key_hash(key)).first()
