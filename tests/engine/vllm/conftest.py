"""A sampler whose server is a double that belongs to the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.contract.conftest import step
from tests.engine.vllm.double import VllmDouble
from tests.engine.vllm.engines import engine_with_server
from training.engine.factory import engine_over
from training.engine.interface import Engine
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import load_base_model
from training.types import LoraConfig


@pytest.fixture(scope="session")
def servers_model(tied_folder: Path) -> BaseModel:
    """The tied model again, for the threads of a server."""
    return load_base_model(str(tied_folder), dtype="float32", device="cpu")


@pytest.fixture
def server(servers_model: BaseModel) -> Iterator[VllmDouble]:
    double = VllmDouble(servers_model, is_on_cpu=False)
    yield double
    double.hold.set()
    double.close()


@pytest.fixture
def make_engine_of(
    tied_base_model: BaseModel, server: VllmDouble, tmp_path: Path
) -> Iterator[Callable[..., Engine]]:
    """A factory of engines that use the server, each with an adapter ``a`` far from the base."""
    engines: list[Engine] = []

    def make(**config: Any) -> Engine:
        engine = engine_with_server(tied_base_model, server, tmp_path / "server", **config)
        engine.trainer.create_adapter("a", LoraConfig(rank=2, seed=1))
        for _ in range(2):
            step(engine.trainer, "a")
        engines.append(engine)
        return engine

    yield make
    server.hold.set()
    for engine in engines:
        engine.sampler.close()


@pytest.fixture
def engine_of_server(make_engine_of: Callable[..., Engine]) -> Engine:
    return make_engine_of()


@pytest.fixture
def built_in(tied_base_model: BaseModel) -> Engine:
    """An engine without a server, for its answers."""
    return engine_over(tied_base_model)
