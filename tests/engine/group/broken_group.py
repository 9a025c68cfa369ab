"""A program: the leader of two ranks, to which something happens (``test_broken_groups``)."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np

from training.base_model_config import BaseModelConfig
from training.engine.factory import build_rank
from training.engine.group.leader import leading
from training.engine.group.members import Members, RankStart, meeting_place
from training.engine.torch.sharding.rank_group import join_group
from training.engine.torch.trainer import TorchTrainer
from training.types import AdamParams, LoraConfig


def main(what: str, folder: Path) -> None:
    config = BaseModelConfig(
        name="tiny", path=str(folder), device="cpu", dtype="float32", tp_size=2
    )
    place = meeting_place()
    start = RankStart(
        config=config,
        folder=str(folder),
        rank=0,
        device="cpu",
        meeting_place=str(place),
        num_threads=1,
        num_sharing=1,
        batch_tokens=512,
        cache_tokens=4096,
    )
    members = Members(start, ["cpu", "cpu"])
    group = join_group(config, rank=0, device="cpu", meeting_place=place)
    own = build_rank(start, group=group, on_stage=str)
    trainer = leading(own, group, members).trainer
    trainer.create_adapter("a", LoraConfig(rank=4))
    assert isinstance(own.trainer, TorchTrainer)
    if what == "differs":
        grad = own.trainer._adapters["a"].grad.flat
        grad.copy_(grad.new_tensor(np.ones(len(grad))))
    else:
        [pid] = members.pids
        os.kill(pid, signal.SIGKILL)
    for _ in range(1000):
        trainer.optim_step("a", AdamParams())
    sys.stdout.write("nothing happened\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
