"""Which versions of weights a worker publishes to its sampler, and when it retires them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from django.contrib.auth.models import User

from futures.models import Future
from tests.conftest import InProcessWorker
from tests.training.test_worker import sample, save
from training import services
from training.base_models import base_model_get
from training.models import Checkpoint, Run

Submit = Callable[..., Future]
Result = Callable[..., dict[str, object]]


@pytest.fixture
def published(work: InProcessWorker, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The versions that were published, in order."""
    names: list[str] = []
    publish = work.engine.sampler.publish

    def noted(version: str, weights: object) -> None:
        names.append(version)
        publish(version, weights)  # type: ignore[arg-type]  # handed on

    monkeypatch.setattr(work.engine.sampler, "publish", noted)
    return names


def test_samples_at_the_same_weights_share_a_version_until_the_run_moves_on(
    owner: User,
    work: InProcessWorker,
    published: list[str],
    forward_backward: Submit,
    optim_step: Submit,
) -> None:
    forward_backward("m", "hi", "hello")
    for _ in range(2):
        sample(owner, model_id="m")
        work()
    run = Run.objects.get()
    first = f"{run.id}:{run.applied_seq_id}"
    assert published == [first]
    assert work.engine.sampler.versions == {first: 0}

    optim_step("m", learning_rate=0.1)
    work()
    assert work.engine.sampler.versions == {}

    sample(owner, model_id="m")
    work()
    run.refresh_from_db()
    assert published == [first, f"{run.id}:{run.applied_seq_id}"]
    assert first != published[1]


def test_a_run_that_is_removed_leaves_no_version(
    owner: User, work: InProcessWorker, published: list[str], forward_backward: Submit
) -> None:
    forward_backward("m", "hi")
    sample(owner, model_id="m")
    work()
    services.run_remove_submit(owner_id=owner.pk, model_id="m")
    work()
    assert len(published) == 1
    assert work.engine.sampler.versions == {}


def test_a_checkpoint_is_published_once_and_is_no_adapter_of_the_trainer(
    owner: User,
    work: InProcessWorker,
    published: list[str],
    forward_backward: Submit,
    result: Result,
) -> None:
    forward_backward("m", "hi")
    saved = save(owner, "m", "frozen", kind="sampler")
    work()
    for _ in range(2):
        sample(owner, model_path=str(result(saved)["path"]))
        work()
    assert published == [f"checkpoint:{Checkpoint.objects.get().pk}"]
    assert work.engine.trainer.adapter_names() == [Run.objects.get().id]


def test_the_base_model_needs_no_version(
    owner: User, work: InProcessWorker, published: list[str]
) -> None:
    sample(owner, base_model=base_model_get(None).name)
    work()
    assert published == []
