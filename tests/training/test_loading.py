"""A worker whose model can never be loaded says why and asks not to be started again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from django.core.management import CommandError, call_command
from pytest_django import Settings

from futures.errors import QueueTaken
from tests.base_models import base_model_configs
from tests.tiny_model import make_tiny_model
from training.base_models import ServedBaseModel, base_model_get
from training.engine.torch import loading
from training.errors import BaseModelNotFound, DeviceNotFound, TrainingError
from training.management.commands import engineworker
from training.worker.process import build_engine

Break = Callable[[Path], object]


@pytest.fixture
def base_model(tmp_path: Path, settings: Settings) -> ServedBaseModel:
    folder = make_tiny_model(tmp_path / "tiny")
    settings.BASE_MODELS = base_model_configs(f"tiny={folder}", device="cpu")
    settings.NUM_THREADS = torch.get_num_threads()
    return base_model_get(None)


def configured(**changes: object) -> Break:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def halved(name: str) -> Break:
    def halve(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return halve


@pytest.mark.parametrize(
    "break_folder",
    [
        halved("model.safetensors"),
        halved("tokenizer.json"),
        configured(hidden_size="x"),
        configured(hidden_size=128),
        configured(num_attention_heads=0),
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    ],
    ids=["weights", "tokenizer", "no number", "other shapes", "zero heads", "no object"],
)
def test_whatever_is_wrong_with_a_folder_is_a_refusal(
    base_model: ServedBaseModel, break_folder: Break
) -> None:
    break_folder(base_model.folder)

    with pytest.raises(BaseModelNotFound, match=str(base_model.folder)):
        build_engine(base_model)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("device full"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_is_taken_now_is_no_fault_of_the_folder(
    base_model: ServedBaseModel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(loading, "load_base_model", fail)

    with pytest.raises(type(error)):
        build_engine(base_model)


def test_a_gpu_that_is_asked_for_and_missing_is_a_refusal(
    base_model: ServedBaseModel, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.BASE_MODELS = base_model_configs(f"tiny={base_model.folder}", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(DeviceNotFound, match="tiny is for cuda and torch sees no GPU"):
        build_engine(base_model_get(None))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BaseModelNotFound("no\nmodel"), os.EX_CONFIG),
        (DeviceNotFound("no model"), os.EX_CONFIG),
        (QueueTaken("no model"), 1),  # the other one may be on its way out
        (TrainingError("no model"), 1),
    ],
)
def test_the_exit_code_tells_a_refusal_from_a_failure(
    monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(engineworker, "run_worker", fail)

    with pytest.raises(CommandError, match=r"^no model$") as caught:
        call_command("engineworker")

    assert caught.value.returncode == status
