"""The disk is full, or fails, while a checkpoint is written: that save fails by name, no more."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import pytest
from django.contrib.auth.models import User

from futures.models import Future
from tests.conftest import InProcessWorker
from tests.faults.conftest import Disk, assert_all_ready, assert_same, state_of
from training import services
from training.models import Checkpoint

Start = Callable[..., InProcessWorker]
Train = Callable[..., list[Future]]
Files = Callable[[str], list[Path]]

Kind = Literal["training", "sampler", "external"]


def save(owner: User, kind: Kind, *, overwrite: bool = False) -> Future:
    return services.save_weights_submit(
        owner_id=owner.pk, model_id="m", name="kept", kind=kind, overwrite=overwrite
    ).future


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize(
    ("code", "name"), [(errno.ENOSPC, "StorageFull"), (errno.EIO, "StorageFailed")]
)
def test_a_save_fails_by_name_and_training_goes_on_to_the_same_bits(
    work: InProcessWorker,
    train: Train,
    disk: Disk,
    files: Files,
    owner: User,
    kind: Kind,
    code: int,
    name: str,
) -> None:
    unbroken = train("unbroken", 4)
    futures = train("m", 2)
    work()
    disk.fail(code)
    failed = save(owner, kind)
    futures += train("m", 1, first=2)
    work()
    failed.refresh_from_db()
    assert (failed.state, failed.category, failed.error_code) == ("failed", "server", name)
    assert failed.attempts == 0
    assert files("checkpoints") == []
    assert not Checkpoint.objects.exists()

    disk.recover()
    again = save(owner, kind)
    futures += train("m", 1, first=3)
    work()
    assert_all_ready([*unbroken, *futures, again])
    assert_same(state_of(work, "m"), state_of(work, "unbroken"))
    assert len(files("checkpoints")) == 1


def test_what_should_be_overwritten_is_kept_until_the_new_one_is_whole(
    work: InProcessWorker, train: Train, disk: Disk, files: Files, owner: User
) -> None:
    train("m", 1)
    save(owner, "training")
    work()
    before = files("checkpoints")
    disk.fail()
    train("m", 1, first=1)
    save(owner, "training", overwrite=True)
    work()
    assert files("checkpoints") == before
    assert Checkpoint.objects.get().step == 1


def test_an_encrypted_export_leaves_nothing_readable_behind(
    work: InProcessWorker, train: Train, disk: Disk, files: Files, owner: User
) -> None:
    train("m", 1)
    work()
    disk.fail()
    failed = services.save_weights_submit(
        owner_id=owner.pk,
        model_id="m",
        name="kept",
        kind="external",
        recipients=["age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"],
    ).future
    work()
    failed.refresh_from_db()
    assert failed.error_code == "StorageFull"
    assert files("checkpoints") == []
