"""Users in the admin: created by a form, without a password unless one is given."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse
from pytest_django import Settings

ADD = reverse("admin:auth_user_add")

PHRASE = "a long enough one"


def visible_form(console: Client) -> dict[str, Any]:
    """The form data of the page to add a user without any input."""
    form = console.get(ADD).context["adminform"]
    names = [name for fieldset in form for line in fieldset for name in line.fields]
    return {name: form.form[name].value() or "" for name in names}


def test_a_client_is_made_without_a_password(console: Client) -> None:
    answer = console.post(
        ADD, {**visible_form(console), "username": "bob", "usable_password": "false"}
    )

    bob = User.objects.get(username="bob")
    assert answer.status_code == 302
    assert not bob.has_usable_password()
    assert (bob.is_staff, bob.is_superuser) == (False, False)


def test_a_person_with_a_password_can_be_made(console: Client) -> None:
    passwords = {"password1": PHRASE, "password2": PHRASE}

    console.post(ADD, {**visible_form(console), "username": "ada", **passwords})

    assert User.objects.get(username="ada").check_password(PHRASE)


@pytest.mark.parametrize("password", ["12345", "password", "adaadaada"])
def test_a_password_that_anybody_guesses_is_refused(console: Client, password: str) -> None:
    passwords = {"password1": password, "password2": password}

    console.post(ADD, {**visible_form(console), "username": "adaadaada", **passwords})

    assert not User.objects.filter(username="adaadaada").exists()


@pytest.mark.parametrize("username", ["", "bob", "no spaces"])
def test_a_name_that_cannot_be_is_refused_in_the_form(console: Client, username: str) -> None:
    User.objects.create_user("bob")
    before = User.objects.count()

    answer = console.post(
        ADD, {**visible_form(console), "username": username, "usable_password": "false"}
    )

    assert answer.status_code == 200
    assert "username" in answer.context["adminform"].form.errors
    assert User.objects.count() == before


def test_the_form_says_what_a_password_is_for(console: Client) -> None:
    html = console.get(ADD).content.decode()

    assert "Only the admin uses it; the API uses keys." in html
    assert "LDAP" not in html


def test_a_persons_page_says_what_they_store(console: Client, settings: Settings) -> None:
    settings.USER_STORAGE_BYTES = 5 * 1024**3
    ada = User.objects.create_user("ada")

    page = console.get(reverse("admin:auth_user_change", args=[ada.pk])).content.decode()

    assert "0 bytes: checkpoints 0 bytes, snapshots of models 0 bytes" in page.replace("\xa0", " ")
    assert "The limit of one user is 5.0 GB." in page.replace("\xa0", " ")
