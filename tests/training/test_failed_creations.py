"""A model that could not be made leaves nothing behind but the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import User
from pytest_django import Settings

from futures.cancelling import future_cancel
from futures.lost_workers import MAX_ATTEMPTS
from futures.models import Future
from tests.conftest import InProcessWorker
from tests.training.test_races import at_once, create
from tests.training.test_worker import sample
from training import services
from training.engine.fake.engine import fake_engine
from training.errors import OutOfMemory, RunExists, RunNotFound
from training.models import Run
from training.selectors import run_get, run_list
from training.types import AdamParams, LoraConfig, SamplingParams

Submit = Callable[..., Future]

IMPOSSIBLE = LoraConfig(train_attn=False, train_mlp=False, train_unembed=False)


def create_impossible(owner: User, model_id: str | None = "m") -> Future:
    return services.run_create_submit(
        owner_id=owner.pk, model_id=model_id, base_model=None, lora_config=IMPOSSIBLE
    ).future


def remove(owner: User) -> Future:
    return services.run_remove_submit(owner_id=owner.pk, model_id="m").future


def ended(future: Future) -> tuple[str, str, str]:
    future.refresh_from_db()
    return future.state, future.category, future.error_code


def test_a_failed_creation_frees_its_name(owner: User, work: InProcessWorker) -> None:
    failed = create_impossible(owner)
    work()
    corrected = create(owner, "m")().future
    work()

    assert ended(failed) == ("failed", "user", "InvalidRequest")
    assert ended(corrected) == ("ready", "", "")
    assert run_get(owner_id=owner.pk, model_id="m").state == "ready"
    assert Run.objects.get(deleted_at__isnull=False).error == failed.error


def test_failed_creations_take_no_place(
    owner: User, work: InProcessWorker, settings: Settings
) -> None:
    settings.MAX_ADAPTERS = 1
    for _ in range(3):
        create_impossible(owner, None)
        work()
    assert not run_list(owner_id=owner.pk).exists()
    create(owner, "m")()


def test_what_waited_behind_a_failed_creation_is_told_why(
    owner: User, work: InProcessWorker, forward_backward: Submit, optim_step: Submit
) -> None:
    failed = create_impossible(owner)
    behind = [forward_backward("m", "hi"), optim_step("m"), forward_backward("m", "hi")]
    work()

    failed.refresh_from_db()
    assert [ended(future) for future in behind] == [("failed", "user", "RunNotCreated")] * 3
    assert {future.error for future in behind} == {
        f"model 'm' could not be created: {failed.error}"
    }


def test_what_comes_later_is_told_why_too(
    owner: User, work: InProcessWorker, optim_step: Submit
) -> None:
    create_impossible(owner)
    work()
    with pytest.raises(RunNotFound, match=r"could not be created: .*at least one must be true"):
        optim_step("m")


def test_a_model_removed_before_it_failed_tells_why_and_is_removed(
    owner: User, work: InProcessWorker, forward_backward: Submit
) -> None:
    create_impossible(owner)
    behind = forward_backward("m", "hi")
    removal = remove(owner)
    work()

    assert ended(behind) == ("failed", "user", "RunNotCreated")
    assert ended(removal) == ("ready", "", "")
    assert Run.objects.get().state == "deleted"


def test_a_creation_that_stops_every_worker_frees_its_name(
    owner: User, start_worker: Callable[..., InProcessWorker], forward_backward: Submit
) -> None:
    def crash(verb: str, adapter_names: tuple[str, ...]) -> None:
        raise RuntimeError(verb)

    creation = create(owner, "m")().future
    behind = forward_backward("m", "hi")
    for _ in range(MAX_ATTEMPTS):
        with pytest.raises(RuntimeError, match="create_adapter"):
            start_worker(fake_engine(before_verb=crash))()
    work = start_worker()

    assert ended(creation) == ("failed", "server", "CrashedWorker")
    assert not run_list(owner_id=owner.pk).exists()
    again = create(owner, "m")().future
    work()
    assert ended(behind) == ("failed", "user", "RunNotCreated")
    assert "stopped the worker" in behind.error
    assert ended(again) == ("ready", "", "")


def test_a_cancelled_creation_frees_its_name(
    owner: User, work: InProcessWorker, forward_backward: Submit
) -> None:
    creation = create(owner, "m")().future
    behind = forward_backward("m", "hi")
    future_cancel(request_id=creation.pk, owner_id=owner.pk)
    again = create(owner, "m")().future
    work()

    assert ended(behind) == ("failed", "user", "RunNotCreated")
    assert behind.error == "model 'm' could not be created: its creation was cancelled"
    assert ended(again) == ("ready", "", "")


def test_a_creation_replayed_in_a_model_that_lives_does_it_no_harm(
    owner: User, work: InProcessWorker, forward_backward: Submit
) -> None:
    creation = create(owner, "m")().future
    work()
    for removes in (False, True):
        run = Run.objects.get()
        repeated = services.run_replay_submit(run=run, original=Future.objects.get(pk=creation.pk))
        behind = forward_backward("m", "hi")
        if removes:
            remove(owner)
        work()
        assert ended(repeated)[0] == "failed"
        assert ended(behind) == ("ready", "", "")
    assert (Run.objects.get().state, Run.objects.get().error) == ("deleted", "")


def test_a_repeated_creation_is_the_one_that_failed(owner: User, work: InProcessWorker) -> None:
    def submit() -> Any:
        return services.run_create_submit(
            owner_id=owner.pk,
            model_id="m",
            base_model=None,
            lora_config=IMPOSSIBLE,
            idempotency_key="k",
        )

    first = submit()
    work()
    assert submit().future.pk == first.future.pk
    assert Run.objects.count() == 1


@pytest.mark.parametrize("made_again", [False, True])
def test_requests_repeated_after_their_models_creation_failed_are_the_first_ones(
    owner: User,
    work: InProcessWorker,
    forward_backward: Submit,
    monkeypatch: pytest.MonkeyPatch,
    made_again: bool,
) -> None:
    def fail(*args: object) -> None:
        raise OutOfMemory("no room")

    def submit() -> list[str]:
        mine: dict[str, Any] = {"owner_id": owner.pk, "model_id": "m"}
        named = {"name": "ck", "kind": "training", "idempotency_key": "3"}
        return [
            forward_backward("m", "hi", idempotency_key="1").pk,
            services.optim_step_submit(
                **mine, adam_params=AdamParams(), idempotency_key="2"
            ).future.pk,
            services.save_weights_submit(**mine, **named).future.pk,
            sample(
                owner, model_id="m", sampling_params=SamplingParams(), idempotency_key="4"
            ).future.pk,
        ]

    first = submit()
    with monkeypatch.context() as patched:
        patched.setattr(work.engine.trainer, "create_adapter", fail)
        work()
    if made_again:
        create(owner, "m")()
    assert submit() == first
    assert Run.objects.live().count() == made_again


@pytest.mark.django_db(transaction=True)
def test_a_name_is_taken_again_only_when_its_creation_is_over(transactional_db: None) -> None:
    ada = User.objects.create_user("ada")
    creation = create(ada, "m")().future
    results = at_once(
        lambda: future_cancel(request_id=creation.pk, owner_id=ada.pk), *[create(ada, "m")] * 6
    )
    made = [result for result in results[1:] if not isinstance(result, RunExists)]
    assert len(made) <= 1
    assert Run.objects.live().count() == len(made)
    assert Run.objects.get(pk=creation.lane_id).state == "failed"
