"""A worker whose environment differs from that of the live ones is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from django.utils import timezone
from pytest_django import Settings

from futures.models import Worker
from tests.platform.model_folders import make_model_folder
from training.base_models import ServedBaseModel, base_model_get
from training.errors import WorkerDisagrees
from training.services.installation import storage_id_ensure
from training.storage.chosen import storage
from training.worker import agreement
from training.worker.agreement import (
    FIGURE,
    base_model_digest,
    check_agreement,
    differences,
    worker_facts,
)
from training.worker.crash_log import crash_file

pytestmark = pytest.mark.django_db


@pytest.fixture
def model(tmp_path: Path) -> ServedBaseModel:
    return replace(base_model_get(None), folder=make_model_folder(tmp_path / "model"))


@pytest.fixture
def live(model: ServedBaseModel) -> Callable[..., Worker]:
    """``live(torch="1.0")``: a live worker with our facts, except these."""

    def start(**facts: str) -> Worker:
        worker = Worker.objects.create(
            queue=model.queue,
            state="live",
            hostname="elsewhere",
            pid=1,
            figures={FIGURE: {**worker_facts(model), **facts}},
        )
        crash_file(worker).parent.mkdir(parents=True, exist_ok=True)
        crash_file(worker).touch()
        return worker

    return start


def test_equal_workers_agree(model: ServedBaseModel, live: Callable[..., Worker]) -> None:
    check_agreement(model, worker_facts(model))  # there is nobody to disagree with
    live()
    live()
    check_agreement(model, worker_facts(model))


@pytest.mark.parametrize("name", ["torch", "base model's files", "secret key", "Python", "sampler"])
def test_each_difference_is_named_with_both_sides(
    model: ServedBaseModel, live: Callable[..., Worker], name: str
) -> None:
    other = live(**{name: "another"})
    ours = worker_facts(model)

    with pytest.raises(WorkerDisagrees) as refused:
        check_agreement(model, ours)

    assert str(refused.value).endswith(
        f": {name}: {ours[name]} here, another at worker {other.pk} on elsewhere"
    )


def test_a_worker_that_has_ended_or_is_silent_is_not_compared(
    model: ServedBaseModel, live: Callable[..., Worker]
) -> None:
    Worker.objects.filter(pk=live(torch="1.0").pk).update(state="lost")
    Worker.objects.filter(pk=live(torch="1.0").pk).update(
        heartbeat_at=timezone.now() - timedelta(minutes=5)
    )
    assert differences(model, worker_facts(model)) == []


def test_a_copy_of_the_data_folder_is_not_the_data_folder(
    model: ServedBaseModel, live: Callable[..., Worker]
) -> None:
    """It has the same installation's id, and not what the live worker writes now."""
    crash_file(live()).unlink()

    [sentence] = differences(model, worker_facts(model))

    assert "mount the same folder" in sentence


def test_an_installation_has_one_id(settings: Settings, tmp_path: Path) -> None:
    settings.DATA_DIR = tmp_path
    assert storage().installation_id() is None
    made = storage_id_ensure()
    assert made == storage_id_ensure() == storage().installation_id()
    assert [path.name for path in tmp_path.iterdir()] == ["installation"]


def test_a_digest_changes_with_a_models_files(
    model: ServedBaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "WHOLE_BYTES", 1000)
    weights = model.folder / "model.safetensors"
    weights.write_bytes(bytes(10**6))
    digests = {base_model_digest(model.folder)}
    (model.folder / "notes.md").write_text("not part of the model")
    assert {base_model_digest(model.folder)} == digests

    changed = bytearray(10**6)
    changed[-1] = 1
    for content in (changed, bytes(10**6 + 1), b"\1" * 10**6):
        weights.write_bytes(content)
        digests.add(base_model_digest(model.folder))
    weights.rename(model.folder / "other.safetensors")
    digests.add(base_model_digest(model.folder))
    (model.folder / "config.json").write_text('{"hidden_size": 2}')
    digests.add(base_model_digest(model.folder))
    assert len(digests) == 6
