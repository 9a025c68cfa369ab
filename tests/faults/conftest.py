"""Faults at the edge of the operating system, and the training that they must not harm."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from django.contrib.auth.models import User
from pytest_django import Settings

from futures.models import Future, Lane
from tests.conftest import InProcessWorker
from training import services
from training.models import Run
from training.types import AdamParams, Conversation, Message

State = dict[str, Any]


@pytest.fixture
def owner(db: None) -> User:
    return User.objects.create_user("ada")


@pytest.fixture
def train(owner: User) -> Callable[..., list[Future]]:
    """``train("m", 3, first=2)``: submit steps 2 to 4, of one forward_backward each."""

    def submit(name: str, steps: int = 1, *, first: int = 0) -> list[Future]:
        futures = []
        for step in range(first, first + steps):
            turns = (Message("user", f"question {step}"), Message("assistant", "answer"))
            passed = services.forward_backward_submit(
                owner_id=owner.pk,
                model_id=name,
                data=[Conversation(turns)],
                loss_fn="cross_entropy",
                loss_fn_config={},
            )
            stepped = services.optim_step_submit(
                owner_id=owner.pk, model_id=name, adam_params=AdamParams(learning_rate=0.1)
            )
            futures += [passed.future, stepped.future]
        return futures

    return submit


def state_of(worker: InProcessWorker, name: str) -> State:
    """The run's adapter, rebuilt if need be; the worker leases its lane, if that is free."""
    run = Run.objects.get(name=name)
    if Lane.objects.filter(pk=run.id, worker=None).update(worker=worker.worker):
        worker.worker.leases.add(run.id)
    return worker.engine.trainer.adapter_state(worker.loop.adapter_cache.bring_run(run))


def assert_same(one: State, other: State) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def assert_all_ready(futures: list[Future]) -> None:
    rows = [Future.objects.get(pk=future.pk) for future in futures]
    assert [(row.state, row.error) for row in rows] == [("ready", "")] * len(rows)


class Disk:
    """The disk under the data folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._fsync = os.fsync
        self._error: int | None = None
        monkeypatch.setattr(os, "fsync", self._write_back)

    def fail(self, error: int = errno.ENOSPC) -> None:
        """From now on nothing can be written back."""
        self._error = error

    def recover(self) -> None:
        self._error = None

    def _write_back(self, descriptor: int) -> None:
        if self._error is not None:
            raise OSError(self._error, os.strerror(self._error))
        self._fsync(descriptor)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture
def files(settings: Settings) -> Callable[[str], list[Path]]:
    """``files("snapshots")``: what this test left in that folder of the data folder, hidden things
    too."""

    def listing(folder: str) -> list[Path]:
        path = Path(settings.DATA_DIR) / folder
        return sorted(set(path.iterdir()) - found[folder]) if path.is_dir() else []

    found: dict[str, set[Path]] = {"snapshots": set(), "checkpoints": set()}
    found = {folder: set(listing(folder)) for folder in found}
    return listing
