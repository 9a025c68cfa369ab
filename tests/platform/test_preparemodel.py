"""Making a base model's folder: whole or absent, and why not."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import huggingface_hub
import pytest
from django.core.management import CommandError, call_command
from huggingface_hub.errors import LocalEntryNotFoundError
from pytest_django import Settings

from tests.base_models import base_model_configs
from training.base_models import DEFAULT_MODEL_NAME, base_model_get
from training.engine.torch import default_model

HUB_MODEL = "somebody/some-model"


@pytest.fixture(autouse=True)
def served(settings: Settings, tmp_path: Path) -> None:
    settings.DATA_DIR = tmp_path
    settings.BASE_MODELS = base_model_configs(DEFAULT_MODEL_NAME, HUB_MODEL)


def test_a_folder_that_is_there_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base_model_get(None).folder.mkdir(parents=True)
    monkeypatch.setattr(default_model, "prepare_default_model", None)  # not to be called

    call_command("preparemodel")


def test_a_model_of_the_hub_appears_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base_model_get(HUB_MODEL).folder

    def download(name: str, *, local_dir: Path, allow_patterns: list[str]) -> None:
        assert name == HUB_MODEL
        assert not any("bin" in pattern for pattern in allow_patterns), "weights without pickle"
        assert not folder.exists()
        (local_dir / ".cache").mkdir(parents=True)
        (local_dir / "config.json").write_text("{}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    call_command("preparemodel", HUB_MODEL, stdout=StringIO())

    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_hub_that_cannot_be_reached_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, *, local_dir: Path, allow_patterns: list[str]) -> None:
        raise LocalEntryNotFoundError("no connection\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CommandError, match=r"could not be downloaded: no connection; name a local"):
        call_command("preparemodel", HUB_MODEL, stdout=StringIO())

    assert not base_model_get(HUB_MODEL).folder.exists()


def test_a_model_that_is_not_served_is_refused_by_name() -> None:
    with pytest.raises(CommandError, match="'other' is not served here"):
        call_command("preparemodel", "other")
