"""Writes of API keys: create, verify (which records the use), revoke; and of users.

Each function is one statement or opens its own transaction. The key itself exists only in
the return value of ``api_key_create``; the database has its hash.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import timedelta

from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import AbstractBaseUser, User
from django.db import transaction
from django.db.models import Q
from django.utils import timezone

from tinkerapi.models import ApiKey
from tinkerapi.selectors import api_key_get, api_key_hash
from training.audit import audit_record

KEY_PREFIX = "tml-"
"""The official SDK refuses a key that begins otherwise."""

PREFIX_CHARACTERS = 12
"""How much of a key stays readable in lists: ``tml-`` and 8 of its 43 random characters."""

MAX_EXPIRY_DAYS = 3650
"""The longest lifetime of a key that expires."""

LOCAL_USERNAME = "local"
"""The user of requests without a key, where they are allowed."""

ADMIN_USERNAME = "admin"

LAST_USED_RESOLUTION = timedelta(minutes=1)


@transaction.atomic
def api_key_create(
    *,
    user: AbstractBaseUser,
    name: str,
    expires_in: timedelta | None = None,
    actor_id: int | None = None,
) -> tuple[ApiKey, str]:
    """Make a key for a user and return its row with the key itself, which is shown this once.

    The key is ``tml-`` and 256 random bits. ``expires_in`` None: it does not expire.
    ``actor_id`` is the user who asked for it; None: somebody at the console.
    """
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    api_key = ApiKey.objects.create(
        user_id=user.pk,
        name=name,
        prefix=key[:PREFIX_CHARACTERS],
        key_hash=api_key_hash(key),
        expires_at=timezone.now() + expires_in if expires_in is not None else None,
        lifetime=expires_in,
    )
    audit_record("key_create", actor_id=actor_id, owner_id=user.pk, prefix=api_key.prefix)
    return api_key, key


def api_key_verify(key: str) -> ApiKey | None:
    """The key's row with its user loaded, or None for an unknown, revoked or expired key.

    ``last_used_at`` is kept to the minute: of many requests in one minute, one writes.
    """
    api_key = api_key_get(key)
    if api_key is None:
        return None
    now = timezone.now()
    if api_key.last_used_at is None or now - api_key.last_used_at >= LAST_USED_RESOLUTION:
        # Compare-and-set, so that parallel requests write once and never move it back.
        ApiKey.objects.filter(
            Q(last_used_at__isnull=True) | Q(last_used_at__lte=now - LAST_USED_RESOLUTION),
            pk=api_key.pk,
        ).update(last_used_at=now)
        api_key.last_used_at = now
    return api_key


@transaction.atomic
def api_key_revoke(*, api_key_id: int, actor_id: int | None = None) -> bool:
    """Revoke a key; True if this call did it, False if it was revoked or is unknown."""
    revoked = ApiKey.objects.filter(pk=api_key_id, revoked_at__isnull=True).update(
        revoked_at=timezone.now()
    )
    if not revoked:
        return False
    closed = ApiKey.objects.get(pk=api_key_id)
    audit_record("key_revoke", actor_id=actor_id, owner_id=closed.user_id, prefix=closed.prefix)
    return True


@transaction.atomic
def api_key_rotate(
    *, api_key_id: int, overlap: timedelta, actor_id: int | None = None
) -> tuple[ApiKey, str] | None:
    """Make a successor of a valid key, which itself stays valid for ``overlap`` at most.

    The successor has its user, its name and its lifetime, also if the key was replaced before.
    Returns None, and makes nothing, if the key is revoked, expired or unknown. Two calls at once
    make one successor each.
    """
    old = ApiKey.objects.select_for_update(of=("self",)).select_related("user")
    key = old.filter(pk=api_key_id).first()
    if key is None or not key.is_valid:
        return None
    successor = api_key_create(
        user=key.user, name=key.name, expires_in=key.lifetime, actor_id=actor_id
    )
    ends = timezone.now() + overlap
    key.expires_at = ends if key.expires_at is None else min(key.expires_at, ends)
    key.save(update_fields=["expires_at"])
    audit_record(
        "key_rotate",
        actor_id=actor_id,
        owner_id=key.user_id,
        prefix=key.prefix,
        successor=successor[0].prefix,
        overlap_seconds=round(overlap.total_seconds()),
    )
    return successor


def user_ensure(username: str) -> tuple[User, bool]:
    """The user of this name, and whether this call made it; a new user has no password.

    Raises:
        ValidationError: The name is not allowed.
    """
    user = User(username=User.normalize_username(username), password=make_password(None))
    user.clean_fields()
    return User.objects.get_or_create(username=user.username, defaults={"password": user.password})


@transaction.atomic
def user_admit(*, user: User, actor_id: int | None = None) -> None:
    """Let a user enter the console, where they see their own objects; a repeat is only
    recorded."""
    User.objects.filter(pk=user.pk).update(is_staff=True)
    audit_record("user_invite", actor_id=actor_id, owner_id=user.pk)


@dataclass(frozen=True, kw_only=True)
class FirstAccounts:
    """The first accounts of a new server; a secret is None unless this call made it."""

    admin_password: str | None
    """The password of the superuser ``admin``, for the admin pages."""
    api_key: str | None
    """A key of the user ``local``, who is the user of keyless requests from this machine."""


@transaction.atomic
def first_accounts_ensure() -> FirstAccounts:
    """Make the users ``local`` and ``admin`` and a first API key if there are none.

    Secrets are returned only once; a second call finds everything and returns none. Lost secrets
    are replaced with ``createapikey`` and Django's ``changepassword``.
    """
    local, _ = user_ensure(LOCAL_USERNAME)
    admin_password = None
    if not User.objects.filter(is_superuser=True).exists():
        admin_password = secrets.token_urlsafe(12)
        User.objects.create_superuser(ADMIN_USERNAME, password=admin_password)
    api_key = None
    if not ApiKey.objects.exists():
        _, api_key = api_key_create(user=local, name="first key")
    return FirstAccounts(admin_password=admin_password, api_key=api_key)
