"""The progress signal: sent while a pass runs, cheap, and harmless without a supervisor."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path

import numpy as np

from tests.tiny_model import make_tiny_model
from training.engine.interface import ForwardBackwardJob
from training.engine.torch.loading import load_base_model
from training.engine.torch.trainer import TorchTrainer
from training.types import Datum, LoraConfig
from training.worker.watchdog import WatchdogSignal


def test_every_layer_of_a_pass_shows_that_it_moves_in_both_directions(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    trainer = TorchTrainer(load_base_model(str(folder), device="cpu", dtype="float32"))
    trainer.create_adapter("a", LoraConfig(rank=2, target_modules=("down_proj",)))
    signs: list[int] = []
    trainer.report_progress(lambda: signs.append(1))
    datum = Datum(
        model_input=np.arange(8, dtype=np.int32),
        loss_fn_inputs={"target_tokens": np.arange(8), "weights": np.ones(8, np.float32)},
    )

    def count(*, forward_only: bool) -> int:
        signs.clear()
        trainer.forward_backward(
            [
                ForwardBackwardJob(
                    adapter_name="a",
                    data=[datum],
                    loss_fn="cross_entropy",
                    forward_only=forward_only,
                )
            ]
        )
        return len(signs)

    layers, linears = 2, 7
    forward = count(forward_only=True)
    assert forward == layers * linears
    # Backward goes from the last layer to the first adapter, in the first layer's end.
    assert count(forward_only=False) == forward + linears + 1


def test_signs_are_rationed_and_a_full_or_broken_pipe_does_no_harm() -> None:
    reader, writer = os.pipe()
    seconds = itertools.count(1.0, 0.05)
    give = WatchdogSignal(writer, clock=lambda: next(seconds))
    for _ in range(100):
        give()
    assert 10 < len(os.read(reader, 4096)) < 60
    assert not os.get_inheritable(writer)

    for _ in range(70):  # more than a pipe holds
        with contextlib.suppress(BlockingIOError):
            os.write(writer, b"." * 1000)
    for _ in range(100):
        give()
    os.close(reader)
    for _ in range(100):
        give()
    os.close(writer)


def test_a_worker_that_nobody_watches_gives_no_sign() -> None:
    WatchdogSignal(-1)()
