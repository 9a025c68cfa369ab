"""The vLLM server as a part of a supervisor: started, watched, killed if it does not answer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.waiting import wait_for
from tinkerapi.server import vllm_part
from tinkerapi.server.supervisor import Supervisor
from tinkerapi.server.vllm_part import VllmPart, vllm_problem
from training.base_model_config import BaseModelConfig, VllmConfig
from training.base_models import ServedBaseModel
from training.vllm_server import VllmConnection, read_connection


@pytest.fixture
def base_model(tmp_path: Path, settings: object) -> ServedBaseModel:
    """Its server is ``fake_vllm.py``, copied to a folder of its own."""
    fake = tmp_path / "fake" / "python"
    fake.parent.mkdir()
    shutil.copy(Path(__file__).with_name("fake_vllm.py"), fake)
    fake.chmod(0o755)
    settings.DATA_DIR = tmp_path / "data"  # type: ignore[attr-defined]
    config = BaseModelConfig(
        name="a", path="/m", sampler="vllm", vllm=VllmConfig(python=str(fake)), dtype="float32"
    )
    return ServedBaseModel(name="a", folder=tmp_path / "m", queue="engine-a", config=config)


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    found = Supervisor(lambda line: said.append(line))
    said: list[str] = []
    found.said = said  # type: ignore[attr-defined]
    yield found
    found.stop(lambda: True)


def starts(base_model: ServedBaseModel) -> list[str]:
    assert base_model.config.vllm is not None
    path = Path(base_model.config.vllm.python).with_name("starts")
    return path.read_text().splitlines() if path.exists() else []


def connection(base_model: ServedBaseModel) -> VllmConnection | None:
    assert base_model.config.vllm is not None
    return read_connection(base_model.config.vllm, base_model.server_folder)


def until(supervisor: Supervisor, look: Callable[[], object]) -> None:
    def tick() -> object:
        supervisor.tick()
        return look()

    wait_for(tick)


@pytest.mark.parametrize("fault", ["dead", "silent", "killed"])
def test_a_server_that_does_not_answer_is_started_again_with_a_new_key(
    base_model: ServedBaseModel,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    monkeypatch.setattr(vllm_part, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(vllm_part, "ANSWER_SECONDS", 0.3)
    part = VllmPart(base_model, dict(os.environ))
    supervisor.add(part)
    first = connection(base_model)
    assert first is not None
    until(supervisor, lambda: part.is_ready)
    assert base_model.config.vllm is not None
    flag = Path(base_model.config.vllm.python).with_name(fault)
    if fault == "killed":
        assert part._child is not None
        assert part._child.process is not None
        part._child.process.kill()
    else:
        flag.touch()
    until(supervisor, lambda: supervisor.restarts == 1)
    flag.unlink(missing_ok=True)
    until(supervisor, lambda: part.is_ready)
    second = connection(base_model)
    assert second is not None
    assert second.key != first.key
    assert [line.split()[0] for line in starts(base_model)] == [first.key, second.key]
    assert "serve" in starts(base_model)[0]


def test_a_server_that_samples_nothing_for_too_long_is_killed(
    base_model: ServedBaseModel, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_part, "LOOK_SECONDS", 0.05)
    now = [0.0]
    supervisor.add(VllmPart(base_model, dict(os.environ), clock=lambda: now[0]))

    def an_hour_later() -> bool:
        now[0] += 3600.0
        return supervisor.restarts == 1

    until(supervisor, an_hour_later)
    (line,) = supervisor.said  # type: ignore[attr-defined]
    assert "sampled no token for 300 s and was killed" in line


def test_a_python_that_does_not_exist_is_refused_before_anything_starts(
    base_model: ServedBaseModel, tmp_path: Path
) -> None:
    assert vllm_problem(base_model) is None
    config = BaseModelConfig(name="a", path="/m", vllm=VllmConfig(python=str(tmp_path / "none")))
    gone = ServedBaseModel(name="a", folder=tmp_path, queue="engine-a", config=config)
    assert "vllm.python" in (vllm_problem(gone) or "")
