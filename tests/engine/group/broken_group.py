"""A program: the leader of two ranks, to which something happens (``test_broken_groups``)."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np

from tests.waiting import wait_for
from training.base_model_config import BaseModelConfig
from training.engine.factory import load_together
from training.engine.group.leader import leading
from training.engine.group.members import Members, RankStart, meeting_place
from training.engine.torch.trainer import TorchTrainer
from training.types import AdamParams, LoraConfig

WAIT_SECONDS = {"stopped at once": 5.0, "stopped while loading": 40.0}
"""The second one begins when both ranks have met."""


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
        wait_seconds=WAIT_SECONDS.get(what, 600.0),
    )
    members = Members(start, ["cpu", "cpu"])
    [pid] = members.pids

    def on_stage(stage: str) -> None:
        if what == "stopped while loading":
            os.kill(pid, signal.SIGSTOP)
        if what == "killed while loading":
            os.kill(pid, signal.SIGKILL)

    if what == "stopped at once":
        os.kill(pid, signal.SIGSTOP)
    elif what == "stopped while loading":
        wait_for(place.exists)  # it has imported its modules, and looks for the first rank
    group, own = load_together(start, members, on_stage=on_stage)
    trainer = leading(own, group, members).trainer
    trainer.create_adapter("a", LoraConfig(rank=4))
    assert isinstance(own.trainer, TorchTrainer)
    if what == "differs":
        grad = own.trainer._adapters["a"].grad.flat
        grad.copy_(grad.new_tensor(np.ones(len(grad))))
    else:
        os.kill(pid, signal.SIGKILL)
    for _ in range(1000):
        trainer.optim_step("a", AdamParams())
    sys.stdout.write("nothing happened\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
