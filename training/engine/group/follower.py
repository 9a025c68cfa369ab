"""A rank that follows: it builds its engine, and does whatever the leader names, until that ends.

A program of its own, which the leader starts (``members``).
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
from pathlib import Path

from training.engine.factory import build_rank
from training.engine.group.members import RankStart
from training.engine.group.verbs import RankEngine, carry_out
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.engine.torch.sharding.rank_group import RankGroup, join_group
from training.engine.torch.trainer import TorchTrainer
from training.errors import BaseModelNotFound, TrainingError
from training.loaded_code import keep_what_is_loaded

logger = logging.getLogger(__name__)


def follow(engine: RankEngine) -> None:
    """Carry out the leader's verbs; ends with an exception, at the latest with the leader."""
    while True:
        message = engine.group.of_first(_nothing)
        try:
            carry_out(engine, message)
        except TrainingError:
            continue  # the leader has it too, and answers


def _nothing() -> tuple[str, tuple[()]]:
    raise AssertionError("only the leader names what is done")


def build(start: RankStart) -> RankEngine:
    """This rank's engine, together with the others."""
    group: RankGroup = join_group(
        start.config,
        rank=start.rank,
        device=start.device,
        meeting_place=Path(start.meeting_place),
        wait_seconds=start.wait_seconds,
    )
    engine = build_rank(start, group=group, on_stage=_ignored)
    trainer, sampler = engine.trainer, engine.sampler
    assert isinstance(trainer, TorchTrainer)  # noqa: S101 - the leader has checked it
    assert isinstance(sampler, ContinuousSampler)  # noqa: S101
    return RankEngine(trainer=trainer, sampler=sampler, group=group)


def _ignored(stage: str) -> None:
    """The leader reports the stages."""


def main() -> None:
    """Run one rank until its leader ends."""
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the leader decides when the group stops
    start = RankStart.from_json(sys.argv[1])
    try:
        engine = build(start)
        keep_what_is_loaded()
        follow(engine)
    except BaseModelNotFound:
        os._exit(os.EX_CONFIG)  # the leader says why
    except Exception:
        logger.exception("rank %d of %s ends", start.rank, start.config.name)
        logging.shutdown()
        os._exit(1)  # without waiting for the others


if __name__ == "__main__":
    main()
