"""A path means one checkpoint, even if several models have had its name in turn."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.utils import timezone

from futures.models import Future
from tests.conftest import ApiClient, InProcessWorker
from tests.training.test_races import at_once, create
from tests.training.test_worker import load, save
from training import services
from training.base_models import base_model_get
from training.errors import CheckpointExists, InvalidRequest
from training.models import AuditEvent, Checkpoint, Run
from training.paths import TinkerPath
from training.selectors import checkpoint_get
from training.services.checkpoints import checkpoint_place
from training.services.upkeep import checkpoint_remove
from training.types import LoraConfig

Submit = Callable[..., Future]
Result = Callable[..., Any]

CLIENTS = 6
PATH = TinkerPath("m", "training", "ck")
REFUSED = ("failed", "CheckpointExists")


def remove(owner: User) -> services.Submission:
    return services.run_remove_submit(owner_id=owner.pk, model_id="m")


def folders() -> set[Path]:
    """The contents of the checkpoints' folder."""
    return set((settings.DATA_DIR / "checkpoints").glob("*"))


def ended(submission: services.Submission) -> tuple[str, str]:
    submission.future.refresh_from_db()
    return submission.future.state, submission.future.error_code


@pytest.fixture
def committed(django_capture_on_commit_callbacks: Any) -> Any:
    """``with committed():`` what waits for a commit is done at the end."""
    return partial(django_capture_on_commit_callbacks, execute=True)


@pytest.fixture
def removed(
    owner: User, work: InProcessWorker, forward_backward: Submit, optim_step: Submit
) -> Checkpoint:
    """The checkpoint ``ck`` of a model ``m`` that was removed; another ``m`` is made since."""
    forward_backward("m", "hi", "hello")
    optim_step("m", learning_rate=0.1)
    save(owner, "m", "ck")
    remove(owner)
    forward_backward("m", "hi", "hello")
    work()
    return Checkpoint.objects.get()


def test_a_removed_models_checkpoint_keeps_its_path(
    owner: User, work: InProcessWorker, removed: Checkpoint
) -> None:
    refused = save(owner, "m", "ck")
    loaded = load(owner, "m", str(PATH))
    work()

    assert ended(refused) == REFUSED
    assert "of a model 'm' that was removed" in refused.future.error
    assert ended(loaded) == ("ready", "")
    assert Run.objects.get(deleted_at=None).step == removed.step == 1
    assert checkpoint_get(owner_id=owner.pk, path=PATH) == removed


def test_overwrite_replaces_a_removed_models_checkpoint(
    owner: User, work: InProcessWorker, removed: Checkpoint, committed: Any
) -> None:
    saved = save(owner, "m", "ck", overwrite=True)
    with committed():
        work()

    assert ended(saved) == ("ready", "")
    assert Checkpoint.objects.get().run == Run.objects.get(deleted_at=None)
    assert not (settings.DATA_DIR / removed.directory).exists()
    assert AuditEvent.objects.filter(event="checkpoint_overwrite").count() == 1
    checkpoint_remove(owner_id=owner.pk, path=PATH)
    assert not Checkpoint.objects.exists()


def test_what_has_expired_gives_its_path_to_the_next_model(
    owner: User, work: InProcessWorker, removed: Checkpoint
) -> None:
    long_ago = timezone.now() - timedelta(days=1)
    Checkpoint.objects.update(created_at=long_ago, expires_at=timezone.now())
    saved = save(owner, "m", "ck")
    work()
    assert ended(saved) == ("ready", "")
    assert Checkpoint.objects.get().pk != removed.pk


def test_another_kind_and_another_owner_have_paths_of_their_own(
    owner: User, work: InProcessWorker, forward_backward: Submit, removed: Checkpoint
) -> None:
    other = User.objects.create_user("grace")
    forward_backward("m", "hi", owner_id=other.pk)
    saves = [save(owner, "m", "ck", kind="sampler"), save(other, "m", "ck")]
    work()
    assert [ended(submission) for submission in saves] == [("ready", "")] * 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_saves_of_two_models_of_one_name_in_one_batch_leave_one_checkpoint(
    owner: User,
    work: InProcessWorker,
    forward_backward: Submit,
    optim_step: Submit,
    committed: Any,
    overwrite: bool,
) -> None:
    before = folders()
    forward_backward("m", "hi")
    work()
    optim_step("m")
    first = save(owner, "m", "ck", overwrite=overwrite)
    remove(owner)
    create(owner, "m")()
    second = save(owner, "m", "ck", overwrite=overwrite)
    with committed():
        work()

    outcomes = [ended(first), ended(second)]
    assert first.future.batch == second.future.batch
    assert outcomes == [("ready", ""), ("ready", "") if overwrite else REFUSED]
    kept = Checkpoint.objects.get()
    assert kept.run_id == (second if overwrite else first).future.lane_id
    assert folders() - before == {settings.DATA_DIR / kept.directory}


@pytest.fixture
def runs(transactional_db: None) -> list[Run]:
    """Removed runs of one owner that all had one name."""
    ada = User.objects.create_user("ada")
    shape = {"base_model": base_model_get(None).name, "rank": 4, "alpha": 32.0, "seed": 0}
    gone = {"state": Run.RunState.DELETED, "deleted_at": timezone.now()}
    return [Run.objects.create(owner=ada, name="m", **shape, **gone) for _ in range(CLIENTS)]


def placing(run: Run, *, overwrite: bool) -> Callable[[], None]:
    """A worker's save of the run under the name that all of them want."""
    directory = Path("checkpoints") / f"race-{run.id}"
    (settings.DATA_DIR / directory).mkdir(parents=True)
    row = Checkpoint(
        run=run,
        owner_id=run.owner_id,
        path_run=run.name,
        kind="training",
        name="ck",
        seq_id=1,
        step=1,
        directory=str(directory),
        size_bytes=1,
    )
    return lambda: checkpoint_place(row, overwrite=overwrite)


@pytest.mark.django_db(transaction=True)
def test_of_many_saves_at_once_under_one_path_one_has_it(runs: list[Run]) -> None:
    results = at_once(*[placing(run, overwrite=False) for run in runs])
    assert results.count(None) == 1
    assert sum(isinstance(result, CheckpointExists) for result in results) == CLIENTS - 1
    assert Checkpoint.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_of_many_saves_at_once_that_overwrite_the_last_one_stays(runs: list[Run]) -> None:
    results = at_once(*[placing(run, overwrite=True) for run in runs])
    assert results == [None] * CLIENTS
    kept = Checkpoint.objects.get()
    assert AuditEvent.objects.filter(event="checkpoint_overwrite").count() == CLIENTS - 1
    left = [run for run in runs if (settings.DATA_DIR / f"checkpoints/race-{run.id}").exists()]
    assert left == [kept.run]


def test_no_list_shows_a_path_twice(api: ApiClient, work: InProcessWorker) -> None:
    """A typical sequence: save, remove, make again, save again, delete."""

    def steps(*paths: str) -> None:
        for path in paths:
            extra = {"name": "ck"} if path == "/save_weights" else {}
            assert api.post(path, model_id="m", **extra).status_code == 200
        work()

    def listed(url: str) -> list[str]:
        return [item["tinker_path"] for item in api.get(url).json()["checkpoints"]]

    steps("/add_lora", "/save_weights", "/remove_lora")
    steps("/add_lora", "/save_weights")
    for url in ("/api/v1/checkpoints", "/api/v1/training_runs/m/checkpoints"):
        assert listed(url) == [str(PATH)]
    deleted = api.delete("/api/v1/training_runs/m/checkpoints/weights/ck")
    assert deleted.status_code == 204
    assert listed("/api/v1/checkpoints") == []


def test_no_model_takes_a_name_that_in_a_path_is_a_runs_id(
    owner: User, work: InProcessWorker, forward_backward: Submit
) -> None:
    forward_backward("m", "hi", "hello")
    work()
    run_id = Run.objects.get().id
    shape: dict[str, Any] = {"base_model": None, "lora_config": LoraConfig()}
    with pytest.raises(InvalidRequest, match=r"model_id: 'run_.* is how this server names runs"):
        services.run_create_submit(owner_id=owner.pk, model_id=run_id, **shape)
    with pytest.raises(InvalidRequest, match="is how this server names runs"):
        forward_backward(run_id, "hi", "hello")
