"""Making a base model's folder: whole or absent, and why not."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import CompletedProcess
from subprocess import run as run_command

import pytest
from django.core.management import CommandError, call_command
from pytest_django import Settings

from tests.base_models import base_model_configs
from tests.environment import command_environment
from tests.platform.hub import Hub, running_hub
from tests.platform.model_folders import weights
from training.base_models import DEFAULT_MODEL_NAME, base_model_get
from training.engine.torch import default_model
from training.management.commands.preparemodel import download_bar

HUB_MODEL = "somebody/some-model"
READER = "hf_of_somebody"


@pytest.fixture(autouse=True)
def served(settings: Settings, tmp_path: Path) -> None:
    settings.DATA_DIR = tmp_path
    settings.BASE_MODELS = base_model_configs(DEFAULT_MODEL_NAME, HUB_MODEL)


def test_a_folder_that_is_there_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base_model_get(None).folder.mkdir(parents=True)
    monkeypatch.setattr(default_model, "prepare_default_model", None)  # not to be called

    call_command("preparemodel")


def prepare(hub: Hub, data_dir: Path, **environment: str) -> CompletedProcess[str]:
    """Run the command with the hub's real client, which reads its address when it is imported."""
    return run_command(
        [sys.executable, "-m", "tinkerapi", "preparemodel"],
        env=command_environment(
            data_dir,
            {
                "TINKERAPI_BASE_MODEL": HUB_MODEL,
                "HF_ENDPOINT": hub.address,
                "HF_HOME": str(data_dir / "hf"),
                **environment,
            },
        ),
        capture_output=True,
        text=True,
        check=False,
    )


FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": weights(),
    "pytorch_model.bin": b"a pickle",
    "modeling_mine.py": b"raise SystemExit",
    "README.md": b"words",
}


def test_a_model_of_the_hub_appears_whole_without_pickles_or_code(tmp_path: Path) -> None:
    folder = base_model_get(HUB_MODEL).folder
    with running_hub(HUB_MODEL, FILES, token=READER) as hub:
        done = prepare(hub, tmp_path, HF_TOKEN=READER)

    assert done.returncode == 0, done.stderr
    kept = {"config.json", "tokenizer.json", "model.safetensors"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[name] for name in kept
    }
    assert "100%  Downloading: 0 of 0 MB" in done.stdout
    assert "HTTP" not in done.stdout + done.stderr


@pytest.mark.parametrize("environment", [{}, {"HF_TOKEN": "wrong"}])
def test_a_model_that_needs_a_token_says_so(tmp_path: Path, environment: dict[str, str]) -> None:
    with running_hub(HUB_MODEL, FILES, token=READER) as hub:
        done = prepare(hub, tmp_path, **environment)

    assert done.returncode != 0
    assert "set HF_TOKEN to one that may read it" in done.stderr
    assert "Traceback" not in done.stderr
    assert not base_model_get(HUB_MODEL).folder.exists()


@pytest.mark.parametrize(
    ("changes", "without", "sentence"),
    [
        ({}, "model.safetensors", "somebody/some-model has its weights in pytorch_model.bin"),
        ({"m.gguf": b""}, "model.safetensors", "has its weights in pytorch_model.bin"),
        (
            {"config.json": b'{"quantization_config": {"quant_method": "awq"}}'},
            "README.md",
            "somebody/some-model holds weights quantized by awq",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, changes: dict[str, bytes], without: str, sentence: str
) -> None:
    files = {name: content for name, content in (FILES | changes).items() if name != without}
    with running_hub(HUB_MODEL, files) as hub:
        done = prepare(hub, tmp_path)

    assert done.returncode != 0
    assert sentence in done.stderr
    assert not {"model.safetensors", "pytorch_model.bin", "m.gguf"} & set(hub.fetched)
    assert not base_model_get(HUB_MODEL).folder.exists()


def test_a_hub_that_cannot_be_reached_is_a_sentence(tmp_path: Path) -> None:
    with running_hub(HUB_MODEL, FILES) as hub:
        pass
    done = prepare(hub, tmp_path)

    assert done.returncode != 0
    assert "somebody/some-model could not be downloaded: " in done.stderr
    assert "; name a local folder as the base model's path instead" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_download_is_told_in_steps_of_five_percent() -> None:
    said: list[tuple[str, float]] = []
    bar = download_bar(lambda stage, share: said.append((stage, share)), 100_000_000)
    files, transfer = bar(total=3), bar(total=0, unit="B")
    for _ in range(1000):
        transfer.update(100_000)
        files.update(1)
    shares = [share for _, share in said]
    assert shares == [number / 20 for number in range(1, 21)]
    assert said[0][0] == "Downloading: 5 of 100 MB"
    for each in (files, transfer):
        each.close()


def test_a_model_that_is_not_served_is_refused_by_name() -> None:
    with pytest.raises(CommandError, match="'other' is not served here"):
        call_command("preparemodel", "other")
