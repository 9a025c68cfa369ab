"""The cost of durability: training steps through log and snapshots against the engine alone.

With both, steps wait in Postgres as futures; the worker's own loop claims them, computes, commits
every result to a disk, and writes snapshots beside the work. Without, the same engine in the
same process is called directly with the same data. The two take turns step by step, so that what
else happens on the machine meets both, and a figure is what a round of steps took in sum.

Wall time is that of the steps. A snapshot is waited for before the other way has its turn, and that
wait is not counted; CPU time counts all of it, and Postgres.

    python tests/benchmarks/durability_cost.py --folder DATA_DIR/models/MODEL
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import django
import numpy as np

from tests.benchmarks.report import Report, at_most, results_option
from tests.benchmarks.served_model import bare_engine
from tinkerapi.server.postgres import EmbeddedPostgres
from training.engine.interface import Engine, ForwardBackwardJob, Trainer
from training.types import AdamParams, Datum, LoraConfig

RANK = 32  # the server's default
GOAL = 1.05


@dataclass
class Spent:
    """The time of one round, per step."""

    wall: float
    cpu: float


def make_data(vocab_size: int, datums: int, tokens: int) -> list[Datum]:
    draw = np.random.default_rng(0).integers(100, vocab_size, (datums, tokens + 1))
    return [
        Datum(
            model_input=row[:-1].astype(np.int32),
            loss_fn_inputs={
                "target_tokens": row[1:].astype(np.int64),
                "weights": np.ones(tokens, np.float32),
            },
        )
        for row in draw
    ]


class Bare:
    """The engine alone."""

    def __init__(self, trainer: Trainer, data: list[Datum]) -> None:
        self._trainer = trainer
        trainer.create_adapter("bare", LoraConfig(rank=RANK))
        self._job = ForwardBackwardJob(adapter_name="bare", data=data, loss_fn="cross_entropy")

    def prepare(self) -> None:
        pass

    def step(self) -> None:
        self._trainer.forward_backward([self._job])
        self._trainer.optim_step("bare", AdamParams())

    def finish(self) -> None:
        pass


class Durable:
    """A worker's loop over a queue that was filled before."""

    def __init__(self, engine: Engine, data: list[Datum]) -> None:
        from django.contrib.auth import get_user_model

        from futures.workers import worker_start
        from training.base_models import base_model_get
        from training.worker.loop import WorkLoop

        self._data = data
        self._owner = get_user_model().objects.create_user("benchmark")
        worker = worker_start(queue=base_model_get(None).queue, figures={})
        self._loop = WorkLoop(
            engine, worker, stopping=lambda: False, bell_rang=lambda seconds: False
        )

    def prepare(self) -> None:
        from training import services

        services.forward_backward_submit(
            owner_id=self._owner.pk,
            model_id="durable",
            data=self._data,
            loss_fn="cross_entropy",
            loss_fn_config={},
        )
        services.optim_step_submit(
            owner_id=self._owner.pk, model_id="durable", adam_params=AdamParams()
        )

    def step(self) -> None:
        self._loop.run_until_idle()

    def finish(self) -> None:
        """Wait for the snapshot that is still being written."""
        self._loop.adapter_cache.settle()


def take_turns(
    bare: Bare, durable: Durable, steps: int, others_cpu: Callable[[], float]
) -> tuple[Spent, Spent]:
    """The time of ``steps`` steps of each, per step."""
    order: list[Bare | Durable] = [bare, durable]
    spent = {way: Spent(0.0, 0.0) for way in order}
    for _ in range(steps):
        order.reverse()
        for way in order:
            way.prepare()
            cpu, wall = time.process_time() + others_cpu(), time.perf_counter()
            way.step()
            spent[way].wall += (time.perf_counter() - wall) / steps
            way.finish()
            spent[way].cpu += (time.process_time() + others_cpu() - cpu) / steps
    return spent[bare], spent[durable]


def cpu_seconds_below(pid: int) -> float:
    """CPU time of a process, its children, and those of them that have ended."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended; its parent has its time
            continue
        parent = int(words[1])
        if parent == pid:
            ticks += int(words[11]) + int(words[12])
        elif stat.parent.name == str(pid):
            ticks += sum(int(word) for word in words[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(report: Report, engine: Engine, postgres: EmbeddedPostgres, options: Options) -> None:
    from futures.models import Future
    from training.models import Snapshot

    data = make_data(engine.trainer.info.vocab_size, options.datums, options.tokens)
    bare, durable = Bare(engine.trainer, data), Durable(engine, data)
    assert postgres.process is not None
    pid = postgres.process.pid
    others_cpu = partial(cpu_seconds_below, pid)
    take_turns(bare, durable, 2, others_cpu)  # warms both up
    rounds = [take_turns(bare, durable, options.steps, others_cpu) for _ in range(options.rounds)]
    assert not Future.objects.exclude(state="ready").exists()
    report.add("a step of the bare engine", [alone.wall for alone, _ in rounds], unit="s")
    report.add("a step through log and snapshots", [kept.wall for _, kept in rounds], unit="s")
    report.add(
        "wall time with durability against without",
        [kept.wall / alone.wall for alone, kept in rounds],
        unit="x",
        goal=at_most(GOAL),
    )
    report.add(
        "CPU time with durability against without",
        [kept.cpu / alone.cpu for alone, kept in rounds],
        unit="x",
        goal=at_most(GOAL),
    )
    written = list(Snapshot.objects.values_list("write_seconds", "size_bytes"))
    report.add("writing a snapshot", [seconds for seconds, _ in written], unit="s")
    report.add("a snapshot's size", [size / 2**20 for _, size in written], unit="MiB")


@dataclass
class Options:
    rounds: int
    steps: int
    datums: int
    tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="the base model")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60, help="in a round")
    parser.add_argument("--datums", type=int, default=2, help="in a step")
    parser.add_argument("--tokens", type=int, default=64, help="in a datum")
    parser.add_argument("--threads", type=int, default=1, help="of torch; idle ones spin")
    parser.add_argument("--snapshot-seconds", type=int, default=30)
    results_option(parser)
    given = parser.parse_args()
    options = Options(given.rounds, given.steps, given.datums, given.tokens)
    with tempfile.TemporaryDirectory(prefix="tinkerapi-bench-") as data_dir:
        os.environ["DJANGO_SETTINGS_MODULE"] = "tinkerapi.settings"
        os.environ["TINKERAPI_DATA_DIR"] = data_dir
        os.environ["TINKERAPI_BASE_MODEL"] = str(given.folder)
        os.environ["TINKERAPI_NUM_THREADS"] = str(given.threads)
        os.environ["TINKERAPI_SNAPSHOT_SECONDS"] = str(given.snapshot_seconds)
        django.setup()
        from django.conf import settings
        from django.db import connections

        from tinkerapi.server.upgrade import schema_migrate

        with EmbeddedPostgres(settings.DATA_DIR) as postgres:
            schema_migrate()
            engine = bare_engine(given.folder)
            report = Report(
                benchmark="durability_cost",
                settings={
                    "model": given.folder.name,
                    "dtype": engine.trainer.info.dtype,
                    "rank": RANK,
                    **vars(options),
                    "threads": given.threads,
                    "snapshot after seconds": given.snapshot_seconds,
                },
            )
            measure(report, engine, postgres, options)
            connections.close_all()
        report.finish(given.results)


if __name__ == "__main__":
    main()
