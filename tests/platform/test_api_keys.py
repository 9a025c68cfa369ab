"""API keys: which ones are valid, and their rows."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from django.contrib.auth.models import User
from django.utils import timezone
from pytest_django import DjangoAssertNumQueries

from tinkerapi.models import ApiKey
from tinkerapi.selectors import api_key_hash
from tinkerapi.services import (
    LAST_USED_RESOLUTION,
    api_key_create,
    api_key_revoke,
    api_key_rotate,
    api_key_verify,
)

pytestmark = pytest.mark.django_db


@pytest.fixture
def user() -> User:
    return User.objects.create_user("ada")


def test_a_new_key_opens_the_door_and_names_its_user(user: User) -> None:
    row, key = api_key_create(user=user, name="laptop")

    found = api_key_verify(key)

    assert found == row
    assert found.user == user


def test_the_official_sdk_accepts_the_form_of_a_key(user: User) -> None:
    _, key = api_key_create(user=user, name="laptop")

    assert key.startswith("tml-")
    assert len(key) >= 4 + 43  # 256 bits take 43 characters of base64


def test_the_database_holds_no_key(user: User) -> None:
    row, key = api_key_create(user=user, name="laptop")

    values = ApiKey.objects.filter(pk=row.pk).values_list().get()

    assert not any(key in str(value) for value in values)
    assert key.startswith(row.prefix)
    assert len(row.prefix) == 12


@pytest.mark.parametrize(
    "mangle",
    [
        lambda key: key[:-1],
        lambda key: key + "x",
        lambda key: key.upper(),
        lambda key: "",
        lambda key: api_key_hash(key),  # a stolen table opens nothing
        lambda key: "\ud800",
        lambda key: "\0",
    ],
)
def test_no_other_string_opens_the_door(user: User, mangle: Callable[[str], str]) -> None:
    _, key = api_key_create(user=user, name="laptop")

    assert api_key_verify(mangle(key)) is None


def test_an_expired_key_is_closed(user: User) -> None:
    row, key = api_key_create(user=user, name="laptop", expires_in=timedelta(days=1))
    assert api_key_verify(key) is not None

    ApiKey.objects.filter(pk=row.pk).update(expires_at=timezone.now() - timedelta(seconds=1))

    assert api_key_verify(key) is None


def test_a_revoked_key_is_closed_and_revoking_twice_changes_nothing(user: User) -> None:
    row, key = api_key_create(user=user, name="laptop")

    assert api_key_revoke(api_key_id=row.pk)
    assert not api_key_revoke(api_key_id=row.pk)
    assert api_key_verify(key) is None


def test_keys_of_an_inactive_user_are_closed(user: User) -> None:
    _, key = api_key_create(user=user, name="laptop")

    user.is_active = False
    user.save(update_fields=["is_active"])

    assert api_key_verify(key) is None


def test_the_last_use_is_written_once_a_minute(
    user: User, django_assert_num_queries: DjangoAssertNumQueries
) -> None:
    row, key = api_key_create(user=user, name="laptop")

    with django_assert_num_queries(1):  # the write; reads do not use the ORM
        api_key_verify(key)
    with django_assert_num_queries(0):
        api_key_verify(key)

    long_ago = timezone.now() - LAST_USED_RESOLUTION
    ApiKey.objects.filter(pk=row.pk).update(last_used_at=long_ago)
    api_key_verify(key)
    row.refresh_from_db()
    assert row.last_used_at is not None
    assert row.last_used_at > long_ago


def test_a_slower_request_does_not_move_the_last_use_back(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, key = api_key_create(user=user, name="laptop")
    newer = timezone.now()
    ApiKey.objects.filter(pk=row.pk).update(last_used_at=newer)
    # The state that a request read before the other one wrote.
    monkeypatch.setattr("tinkerapi.services.api_key_get", lambda key: row)

    api_key_verify(key)

    assert ApiKey.objects.get(pk=row.pk).last_used_at == newer


def test_a_rotated_key_has_a_successor_and_stays_valid_for_a_while(user: User) -> None:
    old, old_key = api_key_create(user=user, name="laptop", expires_in=timedelta(days=30))

    made = api_key_rotate(api_key_id=old.pk, overlap=timedelta(hours=24))

    assert made is not None
    successor, key = made
    assert (successor.user, successor.name) == (user, "laptop")
    assert successor.expires_at is not None
    lifetime = successor.expires_at - successor.created_at
    assert abs(lifetime - timedelta(days=30)) < timedelta(seconds=5)
    assert api_key_verify(key) == successor
    assert api_key_verify(old_key) == old
    old.refresh_from_db()
    assert old.expires_at is not None
    assert abs(old.expires_at - timezone.now() - timedelta(hours=24)) < timedelta(minutes=1)


def test_without_an_overlap_the_old_key_is_refused_at_once(user: User) -> None:
    old, old_key = api_key_create(user=user, name="laptop")

    made = api_key_rotate(api_key_id=old.pk, overlap=timedelta(0))

    assert made is not None
    assert made[0].expires_at is None
    assert api_key_verify(old_key) is None
    assert api_key_verify(made[1]) == made[0]


def test_a_rotation_never_lengthens_a_keys_life(user: User) -> None:
    old, _ = api_key_create(user=user, name="laptop", expires_in=timedelta(hours=1))
    before = old.expires_at

    assert api_key_rotate(api_key_id=old.pk, overlap=timedelta(days=30)) is not None

    old.refresh_from_db()
    assert old.expires_at == before


@pytest.mark.parametrize("lifetime", [None, timedelta(days=90)], ids=["endless", "90 days"])
def test_a_second_rotation_gives_the_same_lifetime_as_the_first(
    user: User, lifetime: timedelta | None
) -> None:
    """A form that was sent twice: the person sees the second successor."""
    old, _ = api_key_create(user=user, name="laptop", expires_in=lifetime)

    for _ in range(2):
        made = api_key_rotate(api_key_id=old.pk, overlap=timedelta(hours=1))
        assert made is not None
        expires_at, expected = made[0].expires_at, lifetime and timezone.now() + lifetime
        if expected is None:
            assert expires_at is None
        else:
            assert expires_at is not None
            assert abs(expires_at - expected) < timedelta(seconds=5)


def test_a_key_that_is_not_valid_has_no_successor(user: User) -> None:
    old, _ = api_key_create(user=user, name="laptop")
    api_key_revoke(api_key_id=old.pk)

    assert api_key_rotate(api_key_id=old.pk, overlap=timedelta(hours=1)) is None
    assert api_key_rotate(api_key_id=0, overlap=timedelta(hours=1)) is None
    assert ApiKey.objects.count() == 1
