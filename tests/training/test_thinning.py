"""The settings that delete checkpoints: a default time to live, and the newest few of a run."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from django.utils import timezone
from pytest_django import Settings

from tests.conftest import ApiClient, InProcessWorker
from training.models import Checkpoint
from training.services.thinning import checkpoints_thin
from training.storage.chosen import storage

pytestmark = pytest.mark.django_db

NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture
def saved(api: ApiClient, work: InProcessWorker) -> None:
    """Five checkpoints of one kind and one of another, an hour apart, the newest two hours old."""
    api.post("/add_lora", model_id="m")
    for name in NAMES:
        api.post("/save_weights", model_id="m", name=name)
    api.post("/api/v1/save_weights_for_sampler_async", model_id="m", name="other")
    work()
    for age, name in enumerate(reversed([*NAMES, "other"]), 2):
        created = timezone.now() - timedelta(hours=age)
        Checkpoint.objects.filter(name=name).update(created_at=created)


def names() -> set[str]:
    return set(Checkpoint.objects.values_list("name", flat=True))


def folders(settings: Settings) -> int:
    return len(list(Path(settings.DATA_DIR, "checkpoints").iterdir()))


@pytest.mark.usefixtures("saved")
def test_a_run_keeps_its_newest_and_its_published_checkpoints(settings: Settings) -> None:
    assert checkpoints_thin() == 0, "nobody asked for it"
    settings.KEEP_CHECKPOINTS = 2
    Checkpoint.objects.filter(name="a").update(public=True)
    before = folders(settings)

    assert checkpoints_thin() == 2

    assert names() == {"a", "d", "e", "other"}
    assert folders(settings) == before - 2
    assert checkpoints_thin() == 0


@pytest.mark.usefixtures("saved")
def test_a_checkpoint_is_kept_for_an_hour(settings: Settings) -> None:
    settings.KEEP_CHECKPOINTS = 1
    Checkpoint.objects.update(created_at=timezone.now() - timedelta(minutes=59))
    assert checkpoints_thin() == 0


@pytest.mark.usefixtures("saved")
def test_what_its_owner_keeps_while_others_are_deleted_stays(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleting files takes time: meanwhile one is published, and the newest is deleted."""
    settings.KEEP_CHECKPOINTS = 1
    delete, place = storage().delete, storage()

    def delete_slowly(directory: str) -> None:
        monkeypatch.setattr(place, "delete", delete)
        delete(directory)
        Checkpoint.objects.filter(name="b").update(public=True)
        Checkpoint.objects.filter(name="e").delete()

    monkeypatch.setattr(place, "delete", delete_slowly)
    assert checkpoints_thin() == 2
    assert names() == {"b", "d", "other"}


def test_a_save_without_a_time_to_live_gets_the_servers(
    api: ApiClient, work: InProcessWorker, settings: Settings
) -> None:
    settings.CHECKPOINT_TTL_DAYS = 3
    api.post("/add_lora", model_id="m")
    api.post("/save_weights", model_id="m", name="theirs")
    api.post("/save_weights", model_id="m", name="own", ttl_seconds=7200)
    work()
    for name, seconds in (("theirs", 3 * 86400), ("own", 7200)):
        checkpoint = Checkpoint.objects.get(name=name)
        assert checkpoint.expires_at == checkpoint.created_at + timedelta(seconds=seconds)
