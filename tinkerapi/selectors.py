"""Reads of API keys and users."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from django.contrib.auth.models import User
from django.db.models import Q, QuerySet
from django.utils import timezone

from futures.database import row_get
from tinkerapi.models import ApiKey


def api_key_hash(key: str) -> str:
    """SHA-256 of the key as 64 hex digits, stored and looked up instead of the key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def api_key_get(key: str) -> ApiKey | None:
    """The valid key with its user loaded; None for every other string."""
    return _valid("key_hash = %(key_hash)s", {"key_hash": api_key_hash(key)})


def api_key_by_id(api_key_id: int) -> ApiKey | None:
    """The key of this id, if it is valid, with its user loaded."""
    return _valid("id = %(id)s", {"id": api_key_id})


def api_key_newest(user_id: int) -> ApiKey | None:
    """The valid key that was made for this user last."""
    is_current = Q(expires_at__isnull=True) | Q(expires_at__gt=timezone.now())
    keys = ApiKey.objects.filter(is_current, user_id=user_id, revoked_at__isnull=True)
    return keys.order_by("-created_at").first()


def user_by_name(username: str) -> User | None:
    """The user of this name, active or not."""
    return row_get(User, "username = %(username)s", {"username": username})


def users_active(*, only: int | None = None) -> QuerySet[User]:
    """The active users by name, or at most the one of this id."""
    users = User.objects.filter(is_active=True).order_by("username")
    return users if only is None else users.filter(pk=only)


def _valid(condition: str, parameters: Mapping[str, Any]) -> ApiKey | None:
    api_key = row_get(ApiKey, condition, parameters)
    if api_key is None:
        return None
    user = row_get(User, "id = %(id)s", {"id": api_key.user_id})
    if user is None:  # deleted between the two reads, and the key with it
        return None
    api_key.user = user
    return api_key if api_key.is_valid else None
