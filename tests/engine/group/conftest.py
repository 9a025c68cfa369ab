"""Groups of two ranks on a CPU, each beside the same base model in one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from tests.engine.families import save_random, small_config
from tests.engine.reference import TinyTrainer
from training.base_model_config import BaseModelConfig
from training.engine.custom_loss.process import CustomLossProcess
from training.engine.factory import build_rank, engine_over
from training.engine.group.leader import leading
from training.engine.group.members import Members, RankStart, meeting_place
from training.engine.interface import Engine
from training.engine.torch.loading import load_base_model
from training.engine.torch.sharding.rank_group import join_group
from training.types import LoraConfig

EXACT = 1e-5
"""Largest relative difference between two ranks and one process."""

SIZES = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
"""Half of a layer has whole vectors of the processor: functions of the numbers left over have other
bits."""

ADAPTERS = {
    "wide": LoraConfig(rank=8, alpha=16.0),
    "narrow": LoraConfig(rank=2, alpha=4.0, train_mlp=False),
    "headless": LoraConfig(rank=3, alpha=3.0, train_unembed=False, train_attn=False),
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One way of sharding one model."""

    model_type: str
    sizes: dict[str, int]
    changes: dict[str, Any]
    layout: str = "auto"
    dtype: str = "float32"


SETUPS = {
    "dense, tensor": Setup(model_type="qwen3", sizes={"tp_size": 2}, changes={}),
    "dense, data": Setup(
        model_type="qwen3", sizes={"fsdp_size": 2}, changes={"tie_word_embeddings": True}
    ),
    "experts, tensor": Setup(model_type="qwen3_moe", sizes={"tp_size": 2}, changes={}),
    "experts, divided": Setup(
        model_type="qwen3_moe", sizes={"tp_size": 2, "ep_size": 2}, changes={}
    ),
    "experts with biases": Setup(
        model_type="gpt_oss", sizes={"tp_size": 2, "ep_size": 2}, changes={}
    ),
    "experts, data": Setup(model_type="qwen3_moe", sizes={"fsdp_size": 2}, changes={}),
    "padded, tensor": Setup(
        model_type="qwen2_moe", sizes={"tp_size": 2}, changes={}, layout="padded"
    ),
    "padded, data": Setup(
        model_type="qwen2_moe", sizes={"fsdp_size": 2}, changes={}, layout="padded"
    ),
}

NARROW_SETUPS = {
    f"{name}, bfloat16": replace(SETUPS[name], dtype="bfloat16")
    for name in ("dense, tensor", "experts, tensor", "padded, tensor")
}
"""Half of one of their layers is a product for which a CPU has another kernel if rows are few."""

in_both_dtypes = pytest.mark.parametrize("pair", [*SETUPS, *NARROW_SETUPS], indirect=True)
"""For tests of a group alone: rounded so, its numbers are not those of one process."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The same base model in one process, and over two ranks."""

    alone: Engine
    group: Engine
    members: Members

    def both(self) -> tuple[Engine, Engine]:
        return self.alone, self.group

    def same(self, adapter_name: str) -> None:
        """Assert that the adapter is the same in both."""
        ours = self.group.trainer.adapter_state(adapter_name)
        theirs = self.alone.trainer.adapter_state(adapter_name)
        assert ours["step"] == theirs["step"]
        for name in ("weights", "exp_avg", "grad"):
            close(ours[name], theirs[name], name)
        close(ours["exp_avg_sq"], theirs["exp_avg_sq"], "exp_avg_sq", limit=2 * EXACT)  # squares


def close(ours: Any, theirs: Any, what: str = "", *, limit: float = EXACT) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    largest = np.abs(theirs).max(initial=0.0)
    difference = np.abs(ours - theirs).max(initial=0.0)
    assert difference <= limit * largest, f"{what}: {difference / largest:.2g} of the largest"


@pytest.fixture(scope="session", params=SETUPS, ids=SETUPS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    setup = (SETUPS | NARROW_SETUPS)[request.param]
    known = small_config(setup.model_type).to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in known}
    folder = save_random(
        small_config(setup.model_type, **sizes, **setup.changes),
        tmp_path_factory.mktemp("group"),
    )
    config = BaseModelConfig(
        name="tiny",
        path=folder,
        device="cpu",
        dtype=setup.dtype,
        layout=setup.layout,
        activation_bytes=1,
        **setup.sizes,
    )
    alone = load_base_model(folder, dtype=setup.dtype, device="cpu", layout=setup.layout)
    environment = dict(os.environ)
    place = meeting_place()
    start = RankStart(
        config=config,
        folder=folder,
        rank=0,
        device="cpu",
        meeting_place=str(place),
        num_threads=1,
        num_sharing=1,
        batch_tokens=512,
        cache_tokens=4096,
        wait_seconds=600.0,
    )
    members = Members(start, ["cpu", "cpu"], leave=_note)
    group = join_group(config, rank=0, device="cpu", meeting_place=place, wait_seconds=600.0)
    losses = CustomLossProcess()
    try:
        own = build_rank(start, group=group, on_stage=_ignored, custom_losses=losses)
        engine = leading(own, group, members)
        one_process = engine_over(alone, batch_tokens=512, cache_tokens=4096)
        trainer = TinyTrainer(alone, token_budget=512, activation_bytes=1)
        yield Pair(alone=replace(one_process, trainer=trainer), group=engine, members=members)
    finally:
        losses.close()
        members.stop()
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)


def _note() -> None:
    """A follower has ended: the test that waits for it fails by itself."""


def _ignored(stage: str) -> None:
    """Report nothing."""


@pytest.fixture
def adapters(pair: Pair, tmp_path: Path) -> Iterator[Pair]:
    """Adapters of several shapes, far from the base model, the same in both."""
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        trainer = pair.alone.trainer
        assert isinstance(trainer, TinyTrainer)
        trainer.create_adapter(name, config)
        state = trainer.adapter_state(name)["weights"]
        values = np.random.default_rng(seed).normal(size=state.shape).astype(np.float32)
        trainer.set_weights(name, 0.1 * values)
        trainer.save_adapter(name, tmp_path / name)
        pair.group.trainer.load_adapter(name, tmp_path / name)
    yield pair
    for engine in pair.both():
        for name in list(engine.trainer.adapter_names()):
            engine.trainer.drop_adapter(name)
