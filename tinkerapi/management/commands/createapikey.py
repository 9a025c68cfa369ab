"""``manage.py createapikey USER``: makes a key for a user and prints it once."""

from __future__ import annotations

from argparse import ArgumentParser
from datetime import timedelta
from typing import Any

from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.core.management import CommandError
from django.core.management.base import BaseCommand

from tinkerapi.services import MAX_EXPIRY_DAYS, api_key_create, user_ensure


class Command(BaseCommand):
    help = "Make an API key for a user and print it; only its hash is kept."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("username", help="the key's user")
        parser.add_argument(
            "--create-user",
            action="store_true",
            help="make the user if it does not exist: an ordinary one, without a password",
        )
        parser.add_argument("--name", default="from the command line", help="label in the admin")
        parser.add_argument("--expires-days", type=int, help="default: the key does not expire")

    def handle(
        self,
        *args: Any,
        username: str,
        name: str,
        expires_days: int | None,
        create_user: bool,
        **options: Any,
    ) -> None:
        if expires_days is not None and not 1 <= expires_days <= MAX_EXPIRY_DAYS:
            raise CommandError(
                f"--expires-days: expected 1 to {MAX_EXPIRY_DAYS}, got {expires_days}"
            )
        if not 1 <= len(name) <= 100:
            raise CommandError(f"--name: expected 1 to 100 characters, got {len(name)}")
        user = self.user_made(username) if create_user else self.user_found(username)
        if not user.is_active:
            raise CommandError(f"user {username!r} is not active, so its keys do not work")
        expires_in = timedelta(days=expires_days) if expires_days is not None else None
        api_key, key = api_key_create(user=user, name=name, expires_in=expires_in)
        # Only the key on standard output, so that a script can read it.
        expiry = "does not expire"
        if api_key.expires_at:
            expiry = f"expires on {api_key.expires_at:%Y-%m-%d}"
        self.stderr.write(f"key of {username}; it {expiry}, and is shown only once:", str)
        self.stdout.write(key)

    def user_found(self, username: str) -> User:
        try:
            return User.objects.get_by_natural_key(username)
        except User.DoesNotExist:
            raise CommandError(
                f"there is no user {username!r}; --create-user makes an ordinary one, "
                "and so does the admin"
            ) from None

    def user_made(self, username: str) -> User:
        """The user of this name, a new one if there is none."""
        try:
            user, is_new = user_ensure(username)
        except ValidationError as error:
            raise CommandError(f"user {username!r}: {' '.join(error.messages)}") from None
        if is_new:
            self.stderr.write(f"made user {user.username}, without a password", str)
        return user
