"""Checks of a worker that joins an installation on another machine: storage, clock, environment.

Each returns what is wrong as sentences, so that one start reports everything.
"""

from __future__ import annotations

import time

from django.conf import settings

from futures.database import execute
from futures.selectors import worker_figure
from training.base_models import ServedBaseModel, base_models
from training.errors import CheckpointNotFound, StorageFailed
from training.selectors import newest_directories
from training.services.installation import (
    installation_adopt,
    installation_id,
    storage_id_ensure,
)
from training.storage.chosen import storage
from training.storage.interface import AREAS, INSTALLATION
from training.worker.agreement import (
    DATA_FOLDER,
    FIGURE,
    STORAGE,
    differences,
    storage_id_name,
    storage_place,
    worker_facts,
)

SOME_FOLDERS = 5
"""Of each kind, looked for in a storage that is new to the database."""

MOST_CLOCK_SECONDS = 5.0
"""Largest difference between the clocks of this machine and of Postgres."""


def storage_problem() -> str | None:
    """Why this machine's storage is not the installation's, or cannot be used, as a sentence."""
    here = storage_place()
    known = [worker_figure(base_model.queue, FIGURE) for base_model in base_models()]
    theirs = [facts for facts in known if facts]
    for facts in theirs:
        there = facts.get(STORAGE, DATA_FOLDER)
        if there != here:
            return (
                f"storage: {here} here, {there} at the workers in this database; set "
                "TINKERAPI_STORAGE as the server does"
            )
    return _bucket_problem(theirs) if storage().is_remote else _data_folder_problem(theirs)


def _bucket_problem(theirs: list[dict[str, str]]) -> str | None:
    if problem := storage().problem():
        return f"storage: {problem}"
    try:
        here = storage().installation_id()
    except StorageFailed as error:
        return f"storage: {error}"
    if here is None:
        return f"storage: no server has used {storage().location}; start the server with it first"
    ids = {facts.get(storage_id_name(), here) for facts in theirs}
    if ids and here not in ids:
        return (
            f"storage: {storage().location} is another installation's than that of the workers in "
            "this database; check AWS_ENDPOINT_URL and the account"
        )
    return None


def _data_folder_problem(theirs: list[dict[str, str]]) -> str | None:
    here = storage().installation_id()
    if here is None:
        return (
            f"data folder: {settings.DATA_DIR} has no file {INSTALLATION!r}, so no server "
            "runs on it; mount the server's data folder, and name it in TINKERAPI_DATA_DIR"
        )
    ids = {facts[storage_id_name()] for facts in theirs if storage_id_name() in facts}
    if ids and here not in ids:
        return (
            f"data folder: {settings.DATA_DIR} is another installation's than that of the workers "
            "in this database; mount the same folder"
        )
    return None


def moved_storage_problem() -> str | None:
    """Why a server must not start with this storage, as a sentence.

    The last workers had another one, and nothing that the database names is in this one; or the
    database names nothing, and this bucket has folders.
    """
    here = storage_place()
    # A new data folder in the place of one that was lost is the operator's decision.
    here_id = storage().installation_id() if storage().is_remote else None
    known = [worker_figure(base_model.queue, FIGURE) for base_model in base_models()]
    theirs = [
        (
            facts.get(STORAGE, DATA_FOLDER),
            facts.get(storage_id_name(), here_id) if storage().is_remote else None,
        )
        for facts in known
        if facts
    ]
    if (here, here_id) in theirs:
        return None
    named = newest_directories(SOME_FOLDERS)
    if any(map(_is_stored, named)):
        return None
    if named and (theirs or storage().is_remote):
        before = ", ".join(sorted({place for place, _ in theirs})) or "another storage"
        return (
            f"TINKERAPI_STORAGE: the checkpoints of this database are in {before}, and {here} has "
            f"none of them (such as {named[0]}); bring them there with a backup and a restore, or "
            "correct the setting"
        )
    if storage().is_remote and not named:
        found = (folder for area in AREAS for folder in storage().folders(area))
        if (folder := next(found, None)) is not None:
            return (
                f"TINKERAPI_STORAGE: {here} has folders that this database does not name, such as "
                f"{folder.directory}; give each server a prefix of its own"
            )
    return None


def storage_claim_problem() -> str | None:
    """Take the storage for this database, or say in a sentence why that cannot be: it has the id of
    another one, and nothing says that this database has used it before."""
    there = storage_id_ensure()
    own = installation_id()
    if not storage().is_remote or there == own:
        return None
    here = storage_place()
    facts = [worker_figure(base_model.queue, FIGURE) or {} for base_model in base_models()]
    is_ours = any((f.get(STORAGE), f.get(storage_id_name())) == (here, there) for f in facts)
    if is_ours or any(map(_is_stored, newest_directories(SOME_FOLDERS))):
        installation_adopt(there)
        return None
    return (
        f"TINKERAPI_STORAGE: {here} is another server's: its object {INSTALLATION!r} has the id "
        f"{there}, and this database {own}; give each server a prefix of its own, or delete that "
        "object if its server is no more"
    )


def _is_stored(directory: str) -> bool:
    try:
        return bool(storage().files(directory))
    except CheckpointNotFound:
        return False


def clock_difference_seconds() -> float:
    """How far this machine's clock is ahead of Postgres's; negative if it is behind."""
    before = time.time()
    [(database,)] = execute("SELECT extract(epoch FROM clock_timestamp())::float8", {})
    return (before + time.time()) / 2 - float(database)


def clock_problem() -> str | None:
    """Why this machine's clock cannot be used, as a sentence."""
    difference = clock_difference_seconds()
    if abs(difference) <= MOST_CLOCK_SECONDS:
        return None
    return (
        f"clock: this machine's is {abs(difference):.1f} s "
        f"{'ahead of' if difference > 0 else 'behind'} Postgres's; expected at most "
        f"{MOST_CLOCK_SECONDS:g} s; synchronize both (NTP)"
    )


def environment_problems(base_model: ServedBaseModel) -> list[str]:
    """Why a worker of this machine cannot work beside the live ones, as sentences; a folder that
    cannot be read is another check's subject."""
    try:
        return differences(base_model, worker_facts(base_model))
    except OSError:
        return []
