"""Tiny engines, datums and an independent reference: transformers and peft, one datum at a time.

torch gets one thread: on a busy machine its threads spend more time waiting for each other
than these models take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.engine.reference import TinyTrainer
from tests.engine.sampling_jobs import MakeSampler, job
from tests.engine.vllm.double import VllmDouble
from tests.engine.vllm.real import RealServer
from tests.tiny_model import VOCAB_SIZE, make_tiny_model, make_wide_model
from training.engine.interface import BaseModelInfo, SampleJob
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import load_base_model
from training.loss_fns import LOSS_FNS
from training.types import Datum, LoraConfig

torch.set_num_threads(1)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Torch's threads, for what must not depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose output head is its embedding matrix."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True)


@pytest.fixture(scope="session")
def untied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a separate output head."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "untied", tied=False)


@pytest.fixture(scope="session")
def tied_base_model(tied_folder: Path) -> BaseModel:
    return load_base_model(str(tied_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def untied_base_model(untied_folder: Path) -> BaseModel:
    return load_base_model(str(untied_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def server_of_tied(tied_folder: Path) -> Iterator[VllmDouble]:
    """A server of the tied model that behaves as vLLM, with an engine of ours."""
    double = VllmDouble(load_base_model(str(tied_folder), dtype="float32", device="cpu"))
    yield double
    double.close()


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose heads vLLM's kernels support."""
    return make_wide_model(tmp_path_factory.mktemp("models") / "wide")


@pytest.fixture(scope="session")
def wide_base_model(wide_folder: Path) -> BaseModel:
    return load_base_model(str(wide_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def vllm_of_wide(
    wide_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealServer]:
    """vLLM itself, serving the wide model."""
    server = RealServer(wide_folder, tmp_path_factory.mktemp("vllm"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def make_engine(
    tied_base_model: BaseModel, untied_base_model: BaseModel
) -> Callable[..., TinyTrainer]:
    """A factory of engines without adapters; the frozen base models are shared."""

    def make(*, tied: bool = True, token_budget: int = 4096) -> TinyTrainer:
        base_model = tied_base_model if tied else untied_base_model
        return TinyTrainer(base_model, token_budget=token_budget)

    return make


@pytest.fixture
def engine(make_engine: Callable[..., TinyTrainer]) -> TinyTrainer:
    return make_engine()


@pytest.fixture
def tiny_info() -> BaseModelInfo:
    """The tiny model's properties, for checks that need no model."""
    return BaseModelInfo(
        name="tiny",
        vocab_size=VOCAB_SIZE,
        max_context_tokens=512,
        num_parameters=0,
        device="cpu",
        dtype="float32",
    )


POLICY_INPUTS: Mapping[str, Callable[[np.random.Generator, tuple[int, ...]], NDArray[Any]]] = {
    "logprobs": lambda rng, shape: rng.normal(size=shape) - 5.5,
    "advantages": lambda rng, shape: rng.normal(size=shape),
    "sequence_ratio_mask": lambda rng, shape: rng.random(shape) < 0.7,
}
"""Random values of the inputs that losses need beside targets."""


@pytest.fixture
def make_datum() -> Callable[..., Datum]:
    """A factory of random datums; equal seeds and arguments give equal datums."""

    def make(
        num_tokens: int, seed: int = 0, *, loss_fn: str = "cross_entropy", num_targets: int = 0
    ) -> Datum:
        rng = np.random.default_rng((seed, num_tokens))
        shape = (num_tokens, num_targets) if num_targets else (num_tokens,)
        inputs = {"target_tokens": rng.integers(0, VOCAB_SIZE, shape).astype(np.int64)}
        if loss_fn == "cross_entropy":
            inputs["weights"] = rng.normal(size=shape).astype(np.float32)
            inputs["weights"][rng.random(shape) < 0.3] = 0.0
        for name in LOSS_FNS[loss_fn].inputs:
            if name != "target_tokens":
                inputs[name] = POLICY_INPUTS[name](rng, shape).astype(np.float32)
        tokens = rng.integers(0, VOCAB_SIZE, num_tokens).astype(np.int32)
        return Datum(model_input=tokens, loss_fn_inputs=inputs)

    return make


@pytest.fixture
def trained(make_engine: Callable[..., TinyTrainer]) -> TinyTrainer:
    """An engine with three adapters of different shapes, each far from the base model."""
    engine = make_engine()
    engine.create_adapter("narrow", LoraConfig(rank=2, alpha=4.0, train_unembed=False))
    engine.create_adapter("wide", LoraConfig(rank=4, alpha=6.0))
    engine.create_adapter("other", LoraConfig(rank=2, alpha=4.0, train_mlp=False))
    for seed, name in enumerate(["narrow", "wide", "other"]):
        engine.randomise(name, seed)
    return engine


@pytest.fixture
def make_sampler(trained: TinyTrainer, tied_base_model: BaseModel) -> MakeSampler:
    """A factory of samplers to which all that was trained is published."""

    def make(**options: int) -> ContinuousSampler:
        text = ChatRenderer(tied_base_model.tokenizer, VOCAB_SIZE)
        sampler = ContinuousSampler(tied_base_model, text, **options)
        for name in trained.adapter_names():
            sampler.publish(name, trained.capture_adapter(name, with_optimizer=False))
        return sampler

    return make


@pytest.fixture
def sampler(make_sampler: MakeSampler) -> ContinuousSampler:
    return make_sampler()


@pytest.fixture
def crowd() -> dict[str, SampleJob]:
    """Jobs of every adapter and kind, of different lengths."""
    return {
        "base": job(seed=1, num_samples=2),
        "narrow": job([7, 8], version="narrow", max_tokens=20, temperature=0.7),
        "wide": job([1] * 30, version="wide", num_samples=3, top_k=9, max_tokens=5),
        "other": job([3, 2, 1], version="other", top_p=0.8, seed=8),
        "narrow too": job([250], version="narrow", temperature=0.0),
    }
