"""The id by which this database and its storage know each other."""

from __future__ import annotations

import secrets

from training.models import Installation
from training.storage.chosen import storage


def installation_id() -> str:
    """This database's id, made at the first call."""
    made, _ = Installation.objects.get_or_create(
        pk=1, defaults={"storage_id": secrets.token_hex(16)}
    )
    return made.storage_id


def installation_adopt(storage_id: str) -> None:
    """Take the id of a storage that is known to be this database's."""
    Installation.objects.update_or_create(pk=1, defaults={"storage_id": storage_id})


def storage_id_ensure() -> str:
    """The id in the storage, written there if there is none.

    A bucket gets the database's, so that another database's server recognises that it is taken.
    Data folders get random ones, so that two of one database are told apart.

    Raises:
        StorageFailed: The storage does not answer.
    """
    new = installation_id() if storage().is_remote else secrets.token_hex(16)
    return storage().installation_id(make=new) or new
