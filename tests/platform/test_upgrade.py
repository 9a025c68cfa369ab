"""A database of each older version, with requests in flight, is brought to this one.

The rows are made by this version and the schema is taken back to the older one under them: a
migration must cope with rows, and a worker must finish what it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.db.migrations.executor import MigrationExecutor

from futures.cancelling import future_cancel
from futures.claiming import future_claim
from futures.models import Future
from futures.payload import decode
from tests.conftest import InProcessWorker
from tinkerapi.server.upgrade import schema_migrate, unapplied_migrations
from training.models import Checkpoint, Run
from training.paths import TinkerPath
from training.selectors import checkpoint_get
from training.services import (
    forward_backward_submit,
    optim_step_submit,
    run_create_submit,
    run_remove_submit,
    sample_submit,
    save_weights_submit,
)
from training.types import AdamParams, Conversation, LoraConfig, Message, SamplingParams

pytestmark = pytest.mark.django_db(transaction=True)

OURS = ("futures", "training", "tinkerapi")


def older_states() -> list[tuple[str, str]]:
    """Every migration of ours that another one follows in its app."""
    loader = MigrationExecutor(None).loader
    names = sorted(key for key in loader.disk_migrations if key[0] in OURS)
    return [
        key
        for key, following in zip(names, [*names[1:], ("", "")], strict=True)
        if key[0] == following[0]
    ]


@pytest.fixture
def newest_again() -> Iterator[None]:
    """After the test, restore this version's tables for the next one."""
    yield
    connection.close()
    schema_migrate()


def migrate_back(target: tuple[str, str]) -> None:
    """The schema as it was after this migration."""
    MigrationExecutor(connection).migrate([target])


def submit(owner: User, steps: range) -> list[Future]:
    """Steps of a run, a sample in each, and a checkpoint."""
    mine: dict[str, Any] = {"owner_id": owner.pk, "model_id": "m"}
    submitted = []
    for step in steps:
        turns = (Message("user", f"step {step}"), Message("assistant", "yes"))
        submitted += [
            forward_backward_submit(
                **mine, data=[Conversation(turns)], loss_fn="cross_entropy", loss_fn_config={}
            ),
            optim_step_submit(**mine, adam_params=AdamParams(learning_rate=0.1)),
            sample_submit(
                **mine,
                base_model=None,
                model_path=None,
                prompts=["so"],
                num_samples=1,
                sampling_params=SamplingParams(max_tokens=5, seed=step),
            ),
            save_weights_submit(**mine, name=f"step-{step}", kind="training"),
        ]
    return [submission.future for submission in submitted]


def results(futures: list[Future]) -> list[Any]:
    rows = Future.objects.in_bulk([future.pk for future in futures])
    assert {row.state for row in rows.values()} == {"ready"}
    return [bytes(rows[future.pk].result or b"") for future in futures]


@pytest.mark.parametrize("state", older_states(), ids=".".join)
def test_a_worker_of_this_version_finishes_what_waited_in_an_older_database(
    start_worker: Callable[..., InProcessWorker], newest_again: None, state: tuple[str, str]
) -> None:
    unbroken, owner = (User.objects.create_user(name) for name in ("twin", "ada"))
    work = start_worker()
    expected = submit(unbroken, range(4))
    done = submit(owner, range(2))
    work()
    waiting = submit(owner, range(2, 4))
    assert future_claim(worker=work.worker, max_futures=3, max_cost=10**6)
    work.die()

    migrate_back(state)
    count = unapplied_migrations()
    assert count >= 1
    assert schema_migrate() == count

    start_worker()()
    assert decode(results(done)[0])["loss"] > 0
    assert results(done + waiting) == results(expected)
    steps = Run.objects.values_list("step", flat=True)
    assert list(steps) == [4, 4]
    assert Checkpoint.objects.filter(run__owner=owner).count() == 4


def test_a_path_that_meant_two_checkpoints_means_one_and_the_other_is_found_by_its_run(
    start_worker: Callable[..., InProcessWorker], newest_again: None
) -> None:
    owner = User.objects.create_user("ada")
    mine: dict[str, Any] = {"owner_id": owner.pk, "model_id": "m"}
    work = start_worker()
    submit(owner, range(2))
    run_remove_submit(**mine)
    submit(owner, range(2, 4))
    work()
    work.die()

    migrate_back(("training", "0003_audit_events"))
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE training_checkpoint SET name = 'a' WHERE name IN ('step-0', 'step-2')"
        )
    schema_migrate()

    old, new = Run.objects.order_by("created_at")
    for run, of in ((new.name, new), (old.id, old)):
        path = TinkerPath(run, "training", "a")
        checkpoint = checkpoint_get(owner_id=owner.pk, path=path)
        assert checkpoint.run == of
        assert checkpoint.path == path


def test_a_model_named_like_anothers_id_does_not_stop_the_upgrade(
    start_worker: Callable[..., InProcessWorker], newest_again: None
) -> None:
    owner = User.objects.create_user("ada")
    work = start_worker()
    for step in range(2):
        submit(owner, range(step, step + 1))
        run_remove_submit(owner_id=owner.pk, model_id="m")
    submit(owner, range(2, 3))
    work()
    work.die()

    migrate_back(("training", "0003_audit_events"))
    first, second, third = Run.objects.order_by("created_at").values_list("id", flat=True)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE training_checkpoint SET name = 'a'")
        cursor.execute("UPDATE training_run SET name = %s WHERE id = %s", [first, third])
    schema_migrate()

    paths = dict(Checkpoint.objects.values_list("run_id", "path_run"))
    assert paths == {first: first, second: "m", third: third}


def test_a_model_that_could_not_be_made_in_an_older_version_frees_its_name(
    start_worker: Callable[..., InProcessWorker], newest_again: None
) -> None:
    owner = User.objects.create_user("ada")
    named = {"owner_id": owner.pk, "base_model": None, "lora_config": LoraConfig()}
    impossible = LoraConfig(train_attn=False, train_mlp=False, train_unembed=False)
    work = start_worker()
    run_create_submit(**{**named, "lora_config": impossible}, model_id="failed")
    work()
    cancelled = run_create_submit(**named, model_id="cancelled").future
    future_cancel(request_id=cancelled.pk, owner_id=owner.pk)
    run_create_submit(**named, model_id="waits")
    work.die()

    migrate_back(("training", "0004_checkpoint_path"))
    with connection.cursor() as cursor:
        for name, state, error in (("failed", "failed", "no"), ("cancelled", "creating", "")):
            cursor.execute(
                "UPDATE training_run SET state = %s, error = %s, deleted_at = NULL WHERE name = %s",
                [state, error, name],
            )
    schema_migrate()

    states = dict(Run.objects.values_list("name", "state"))
    assert states == {"failed": "failed", "cancelled": "failed", "waits": "creating"}
    for name in ("failed", "cancelled"):
        run_create_submit(**named, model_id=name)
    start_worker()()
    assert set(Run.objects.live().values_list("state", flat=True)) == {"ready"}


def test_every_older_version_is_tried() -> None:
    assert ("futures", "0001_initial") in older_states()
    assert ("training", "0001_initial") in older_states()
