"""Requests about weights that meet at the same moment, on real connections."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import User

from futures.models import Future, Lane
from tests.training.test_races import at_once
from training.base_models import base_model_get
from training.errors import CheckpointNotFound
from training.models import AuditEvent, Checkpoint, Run
from training.paths import TinkerPath
from training.services.checkpoints import model_load_submit
from training.services.copies import checkpoint_copy
from training.services.sessions import session_create
from training.services.upkeep import checkpoint_publish, checkpoint_remove

pytestmark = pytest.mark.django_db(transaction=True)

CLIENTS = 6


@pytest.fixture
def checkpoint(transactional_db: None) -> Checkpoint:
    """One that ada has kept, with a file."""
    ada = User.objects.create_user("ada")
    run = Run.objects.create(
        owner=ada, name="m", base_model=base_model_get(None).name, rank=4, alpha=32.0, seed=0
    )
    directory = Path("checkpoints") / f"race-{run.id}"
    (settings.DATA_DIR / directory).mkdir(parents=True)
    (settings.DATA_DIR / directory / "weights").write_bytes(b"1234")
    return Checkpoint.objects.create(
        run=run,
        owner=ada,
        path_run=run.name,
        kind="training",
        name="a",
        seq_id=1,
        step=1,
        directory=str(directory),
        size_bytes=4,
    )


def load(checkpoint: Checkpoint) -> Callable[[], Any]:
    session = session_create(owner_id=checkpoint.run.owner_id, sdk_version="0.38.0")
    return lambda: model_load_submit(
        owner_id=checkpoint.run.owner_id,
        session_id=session.id,
        model_seq_id=0,
        path="tinker://m/weights/a",
        optimizer=True,
    )


def test_creations_of_one_number_from_a_checkpoint_are_one(checkpoint: Checkpoint) -> None:
    submissions = at_once(*[load(checkpoint)] * CLIENTS)

    assert len({submission.future.id for submission in submissions}) == 1
    assert Run.objects.filter(session__isnull=False).count() == 1
    [future] = Future.objects.all()
    assert (future.kind, future.seq_id) == ("create_run", 0)
    assert Lane.objects.get(pk=future.lane_id).next_seq_id == 0


def test_copies_under_one_key_are_one_copy_and_leave_no_other_files(
    checkpoint: Checkpoint,
) -> None:
    folder = settings.DATA_DIR / "checkpoints"
    before = set(folder.iterdir())
    paths = at_once(
        *[
            lambda: checkpoint_copy(
                owner_id=checkpoint.run.owner_id,
                source=TinkerPath("m", "training", "a"),
                idempotency_key="k",
            )
        ]
        * CLIENTS
    )

    assert len({str(path) for path in paths}) == 1
    copy = Checkpoint.objects.exclude(pk=checkpoint.pk).get()
    assert set(folder.iterdir()) - before == {settings.DATA_DIR / copy.directory}
    assert (settings.DATA_DIR / copy.directory / "weights").read_bytes() == b"1234"


def test_one_of_many_deletions_deletes_and_the_others_find_nothing(
    checkpoint: Checkpoint,
) -> None:
    def remove() -> None:
        checkpoint_remove(owner_id=checkpoint.run.owner_id, path=TinkerPath("m", "training", "a"))

    results = at_once(*[remove] * CLIENTS)
    assert results.count(None) == 1
    assert sum(isinstance(result, CheckpointNotFound) for result in results) == CLIENTS - 1
    assert AuditEvent.objects.filter(event="checkpoint_delete").count() == 1
    assert not (settings.DATA_DIR / checkpoint.directory).exists()


def test_many_publish_at_once_and_it_is_logged_once(checkpoint: Checkpoint) -> None:
    def publish() -> None:
        checkpoint_publish(
            owner_id=checkpoint.run.owner_id,
            path=TinkerPath("m", "training", "a"),
            public=True,
        )

    assert at_once(*[publish] * CLIENTS) == [None] * CLIENTS
    assert AuditEvent.objects.filter(event="checkpoint_publish").count() == 1
