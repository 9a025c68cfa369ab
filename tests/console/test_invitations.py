"""An invited user sets a password by a link, and then sees their own objects."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta

import pytest
from django.contrib.auth.models import User
from django.contrib.auth.tokens import PasswordResetTokenGenerator
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from tests.console.conftest import page
from training.models import AuditEvent

SUBMITTED = {"_form_submitted": "True"}
PHRASE = "a long enough one"
LOGIN = reverse("admin:login")


@pytest.fixture
def invited(user_factory: Callable[..., User]) -> User:
    return user_factory()


def invite(console: Client, user: User) -> str:
    """The path of the link that the page shows."""
    answer = console.post(page(user, "invite"), SUBMITTED)
    [url] = re.findall(r'id="invitation">(\S+)</pre>', answer.content.decode())
    assert url.startswith("http://testserver/admin/invitation/")
    return str(url.removeprefix("http://testserver"))


def set_password(path: str, password: str = PHRASE) -> tuple[Client, bool]:
    """Whether a person who opens the link can set this password."""
    client = Client()
    opened = client.get(path, follow=True)
    here = opened.redirect_chain[-1][0] if opened.redirect_chain else path
    answer = client.post(here, {"password1": password, "password2": password})
    return client, answer.status_code == 302 and answer["Location"] == LOGIN


def test_an_invited_user_sets_a_password_and_enters(
    console: Client, superuser: User, invited: User
) -> None:
    client, is_set = set_password(invite(console, invited))

    assert is_set
    invited.refresh_from_db()
    assert invited.check_password(PHRASE)
    assert (invited.is_staff, invited.is_superuser) == (True, False)
    entered = client.post(
        f"{LOGIN}?next=/admin/", {"username": invited.username, "password": PHRASE}, follow=True
    )
    assert entered.context["title"] == "Dashboard"
    event = AuditEvent.objects.get(event="user_invite")
    assert (event.actor_id, event.owner_id) == (superuser.pk, invited.pk)


def test_a_link_works_once(console: Client, invited: User) -> None:
    path = invite(console, invited)
    assert set_password(path)[1]

    _, is_set = set_password(path, "another long one")

    assert not is_set
    assert "expired or was used" in Client().get(path).content.decode()
    invited.refresh_from_db()
    assert invited.check_password(PHRASE)


def test_a_link_ends_after_three_days(
    console: Client, invited: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = invite(console, invited)
    later = timezone.now().replace(tzinfo=None) + timedelta(days=3, minutes=1)
    monkeypatch.setattr(PasswordResetTokenGenerator, "_now", lambda self: later)

    assert not set_password(path)[1]


def test_a_link_of_another_user_or_of_nobody_is_refused(
    console: Client, invited: User, user_factory: Callable[..., User]
) -> None:
    path = invite(console, invited)
    token = path.split("/")[-2]
    for uid in ("MQ", "eA", "_", "9" * 50):
        assert not set_password(f"/admin/invitation/{uid}/{token}/")[1]
    invited.is_active = False
    invited.save()
    assert not set_password(path)[1]


def test_a_password_that_anybody_guesses_is_refused(console: Client, invited: User) -> None:
    assert not set_password(invite(console, invited), "password")[1]


def test_only_superusers_invite(
    staff: User, invited: User, browser: Callable[[User], Client]
) -> None:
    assert browser(staff).post(page(invited, "invite"), SUBMITTED).status_code in (302, 403, 404)
    invited.refresh_from_db()
    assert not invited.is_staff
    assert not AuditEvent.objects.exists()


def test_a_user_who_was_deactivated_cannot_be_invited(console: Client, invited: User) -> None:
    User.objects.filter(pk=invited.pk).update(is_active=False)

    assert console.post(page(invited, "invite"), SUBMITTED).status_code == 403
