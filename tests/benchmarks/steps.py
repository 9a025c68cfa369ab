"""Small training steps: the cost of the tinker SDK's round trip, and the speed of the control
plane.

A step is a forward_backward and an optim_step submitted together. Two figures: such a step
through the official SDK and a whole server against the same two calls of the bare engine; and
steps per second of claim, schedule, commit and notify alone, with an engine that costs nothing,
over a queue that was filled before.

    python tests/benchmarks/steps.py
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from tests.base_models import base_model_configs
from tests.benchmarks.report import Report, at_least, at_most, results_option
from tests.benchmarks.served_model import bare_engine, served, use_database_of
from tests.server import Server
from training.engine.interface import ForwardBackwardJob, Trainer
from training.types import AdamParams, Datum, LoraConfig

TOKENS = list(range(8, 17))  # eight positions: next to nothing to compute
RANK = 8
RUNS = 4


def small_datum() -> Datum:
    """A datum of tokens: nothing has to be rendered."""
    return Datum(
        model_input=np.array(TOKENS[:-1], np.int32),
        loss_fn_inputs={
            "target_tokens": np.array(TOKENS[1:], np.int64),
            "weights": np.ones(len(TOKENS) - 1, np.float32),
        },
    )


class Bare:
    """The step on the engine alone, in this process."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        trainer.create_adapter("bare", LoraConfig(rank=RANK))
        self._job = ForwardBackwardJob(
            adapter_name="bare", data=[small_datum()], loss_fn="cross_entropy"
        )

    def step(self) -> None:
        self._trainer.forward_backward([self._job])
        self._trainer.optim_step("bare", AdamParams())


class Sdk:
    """The step through the official SDK."""

    def __init__(self, server: Server, base_model: str) -> None:
        os.environ.setdefault("TINKER_API_KEY", "tml-local")
        import tinker

        self._types: Any = tinker.types
        service = tinker.ServiceClient(base_url=server.url, api_key=_key(server))
        self._client = service.create_lora_training_client(
            base_model=base_model, rank=RANK
        ).result()
        self._datum = tinker.types.Datum(
            model_input=tinker.types.ModelInput.from_ints(TOKENS[:-1]),
            loss_fn_inputs={"target_tokens": TOKENS[1:], "weights": [1.0] * (len(TOKENS) - 1)},
        )

    def step(self) -> None:
        passed = self._client.forward_backward([self._datum], "cross_entropy")
        stepped = self._client.optim_step(self._types.AdamParams())
        passed.result()
        stepped.result()


def _key(server: Server) -> str:
    """The first API key, as ``up`` printed it."""
    [line] = [line for line in server.log().splitlines() if line.startswith("api key")]
    return line.split()[2]


def timed_ms(work: Any) -> float:
    begin = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - begin)


def round_trips(report: Report, server: Server, folder: Path, pairs: int) -> None:
    bare, sdk = Bare(bare_engine(folder).trainer), Sdk(server, folder.name)
    rounds = [(timed_ms(bare.step), timed_ms(sdk.step)) for _ in range(pairs + 3)][3:]
    report.add("a step of the bare engine", [alone for alone, _ in rounds], unit="ms")
    report.add("a step through the SDK", [called for _, called in rounds], unit="ms")
    report.add(
        "the SDK's step above the bare engine's",
        [called - alone for alone, called in rounds],
        unit="ms",
        goal=at_most(25.0),
    )


def control_plane(report: Report, steps: int, repetitions: int) -> None:
    """Drain a queue of steps of a few runs with an engine that costs next to nothing."""
    from django.conf import settings
    from django.contrib.auth import get_user_model

    from futures.workers import worker_start, worker_stop
    from training import services
    from training.base_models import base_model_get
    from training.engine.fake.engine import fake_engine
    from training.worker.loop import WorkLoop

    # A separate queue, which the server's worker does not serve.
    settings.BASE_MODELS = base_model_configs("fake")
    owner = get_user_model().objects.create_user("benchmark")
    queue = base_model_get(None).queue
    rates = []
    for repetition in range(repetitions):
        for index in range(RUNS):
            for _ in range(steps // RUNS):
                name = f"run-{repetition}-{index}"
                services.forward_backward_submit(
                    owner_id=owner.pk,
                    model_id=name,
                    data=[small_datum()],
                    loss_fn="cross_entropy",
                    loss_fn_config={},
                )
                services.optim_step_submit(
                    owner_id=owner.pk, model_id=name, adam_params=AdamParams()
                )
        worker = worker_start(queue=queue, figures={})
        loop = WorkLoop(
            fake_engine(), worker, stopping=lambda: False, bell_rang=lambda seconds: False
        )
        begin = time.perf_counter()
        loop.run_until_idle()
        rates.append(steps / (time.perf_counter() - begin))
        worker_stop(worker)
    report.add("steps per second of the control plane", rates, unit="1/s", goal=at_least(200.0))


def main() -> None:
    parser = argparse.ArgumentParser(description="small steps: the SDK's, and the control plane's")
    parser.add_argument("--pairs", type=int, default=40, help="for the SDK's round trip")
    parser.add_argument("--steps", type=int, default=400, help="for the control plane")
    parser.add_argument("--repetitions", type=int, default=5)
    results_option(parser)
    options = parser.parse_args()
    report = Report(
        benchmark="steps",
        settings={
            "pairs": options.pairs,
            "steps": options.steps,
            "runs": RUNS,
            "repetitions": options.repetitions,
        },
    )
    with (
        tempfile.TemporaryDirectory(prefix="tinkerapi-bench-") as data_dir,
        served("tiny", Path(data_dir)) as (server, folder),
    ):
        use_database_of(server)
        round_trips(report, server, folder, options.pairs)
        control_plane(report, options.steps, options.repetitions)
    report.finish(options.results)


if __name__ == "__main__":
    main()
