"""Checks of a worker that joins an installation on another machine: storage, clock, environment.

Each returns what is wrong as sentences, so that one start reports everything.
"""

from __future__ import annotations

import time

from django.conf import settings

from futures.database import execute
from futures.selectors import worker_figure
from training.base_models import ServedBaseModel, base_models
from training.storage.chosen import storage
from training.storage.data_folder import INSTALLATION_FILE
from training.worker.agreement import FIGURE, differences, worker_facts

MOST_CLOCK_SECONDS = 5.0
"""Largest difference between the clocks of this machine and of Postgres."""


def storage_problem() -> str | None:
    """Why this data folder is not the installation's, as a sentence."""
    here = storage().installation_id(make=False)
    if here is None:
        return (
            f"data folder: {settings.DATA_DIR} has no file {INSTALLATION_FILE!r}, so no server "
            "runs on it; mount the server's data folder, and name it in TINKERAPI_DATA_DIR"
        )
    known = [worker_figure(base_model.queue, FIGURE) for base_model in base_models()]
    theirs = {facts["data folder's installation"] for facts in known if facts}
    if theirs and here not in theirs:
        return (
            f"data folder: {settings.DATA_DIR} is another installation's than that of the workers "
            "in this database; mount the same folder"
        )
    return None


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
