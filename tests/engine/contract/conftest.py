"""Every implementation of the roles, with two adapters that are far from the base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.vllm.double import VllmDouble
from tests.engine.vllm.engines import engine_with_server
from tests.engine.vllm.real import RealServer
from training.engine.factory import engine_over
from training.engine.fake.engine import fake_engine
from training.engine.interface import Engine, ForwardBackwardJob, Trainer
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import load_base_model
from training.types import AdamParams, Datum, ForwardBackwardOutput, LoraConfig

PROMPT = [5, 77, 130, 9, 200]
"""In the vocabularies of all of them."""


def step(trainer: Trainer, adapter_name: str) -> None:
    """Train an adapter on one datum, with a step that changes its samples."""
    datum = Datum(
        model_input=np.array(PROMPT[:-1], np.int32),
        loss_fn_inputs={
            "target_tokens": np.array(PROMPT[1:], np.int64),
            "weights": np.ones(len(PROMPT) - 1, np.float32),
        },
    )
    job = ForwardBackwardJob(adapter_name=adapter_name, data=[datum], loss_fn="cross_entropy")
    (output,) = trainer.forward_backward([job])
    assert isinstance(output, ForwardBackwardOutput), output
    trainer.optim_step(adapter_name, AdamParams(learning_rate=0.1))


@pytest.fixture(scope="session")
def padded_base_model(tied_folder: Path) -> BaseModel:
    return load_base_model(str(tied_folder), dtype="float32", device="cpu", layout="padded")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every engine for every test, but servers only for those of samplers."""
    if "engine" in metafunc.fixturenames:
        engines: list[Any] = ["fake", "torch", "padded"]
        if metafunc.module.__name__.endswith("test_sampler"):
            engines += ["server", pytest.param("vllm", marks=pytest.mark.vllm)]
        metafunc.parametrize("engine", engines, indirect=True)


@pytest.fixture
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """``server`` samples over HTTP from another engine of ours, ``vllm`` from vLLM itself."""
    if request.param == "fake":
        engine = fake_engine()
    elif request.param in ("server", "vllm"):
        model = "wide" if request.param == "vllm" else "tied"
        server: VllmDouble | RealServer = request.getfixturevalue(f"{request.param}_of_{model}")
        base_model: BaseModel = request.getfixturevalue(f"{model}_base_model")
        engine = engine_with_server(base_model, server, tmp_path_factory.mktemp("server"))
    else:
        layout = "padded" if request.param == "padded" else "tied"
        base_model = request.getfixturevalue(f"{layout}_base_model")
        engine = engine_over(base_model)
    for seed, name in enumerate("ab"):
        engine.trainer.create_adapter(name, LoraConfig(rank=2, seed=seed))
        for _ in range(2):
            step(engine.trainer, name)
    yield engine
    engine.sampler.close()


@pytest.fixture
def same_state() -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Asserts that two ``adapter_state``s are equal to the bit."""

    def check(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)

    return check
