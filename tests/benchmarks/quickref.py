"""The quick reference's speed-up table, measured: five batches, sync against async.

Async can only gain what merging gains: batches that wait together become one pass over the
base model. So the limit is measured too, in the same run on the same data, with the engine
alone: five separate passes against one merged pass. Async pays for that with twice as many calls,
so there is a second limit, that of a server which costs nothing: the same passes, with five and
ten calls that ask for nothing. Also measured: what a sync call costs above the bare engine call,
the gain of a client that keeps its connection, and whether all ways give the same losses.

    python tests/benchmarks/quickref.py --model tiny
    python tests/benchmarks/quickref.py --model default --model-folder PATH
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.report import Report, at_least, at_most, results_option
from tests.benchmarks.served_model import bare_engine, served, use_database_of
from tests.server import Server
from training.engine.interface import Engine, ForwardBackwardJob
from training.types import AdamParams, ForwardBackwardOutput, LoraConfig

MODEL_ID = "user_123"
Batch = list[list[dict[str, str]]]

# One conversation each, of the length of the quick reference's own.
BATCHES: list[Batch] = [
    [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}]]
    for question, answer in [
        ("What is two plus two?", "Four."),
        ("Name a colour of the rainbow.", "Green."),
        ("Which animal says moo?", "The cow does."),
        ("Is the sea salty?", "Yes, it is."),
        ("What comes after Monday?", "Tuesday."),
    ]
]


@dataclass(frozen=True)
class Timed:
    """One way of doing all five batches."""

    seconds: float
    losses: list[float]


def timed(work: Callable[[], list[float]]) -> Timed:
    begin = time.perf_counter()
    losses = work()
    return Timed(time.perf_counter() - begin, losses)


class Client:
    """The quick reference's client: ``requests.post``, one connection per call.

    With a session it is ``session.post``, which keeps its connection.
    """

    def __init__(self, server: Server, session: requests.Session | None = None) -> None:
        self._server = server
        self._http: Any = session or requests  # the module has the same verbs

    def post(self, path: str, **body: Any) -> requests.Response:
        answer: requests.Response = self._http.post(
            f"{self._server.url}{path}", json=body, timeout=300
        )
        return answer

    def forward_backward(self, path: str, batch: Batch) -> Any:
        answer = self.post(path, model_id=MODEL_ID, data=batch, loss_fn="cross_entropy")
        answer.raise_for_status()
        return answer.json()

    def nothing(self) -> list[float]:
        """The cost of a call that reaches neither database nor worker."""
        self._http.get(f"{self._server.url}/healthz", timeout=300).raise_for_status()
        return []

    def sync(self) -> list[float]:
        return [
            float(self.forward_backward("/api/v1/forward_backward", batch)["loss"])
            for batch in BATCHES
        ]

    def submitted_together(self, get_future: Callable[[str], Any]) -> list[float]:
        """The template "Batched Async", with this ``get_future``."""
        futures = [
            self.forward_backward("/api/v1/forward_backward_async", batch)["request_id"]
            for batch in BATCHES
        ]
        return [float(get_future(request_id)["loss"]) for request_id in futures]

    def get_future_sleeping(self, request_id: str) -> Any:
        """The quick reference's own loop."""
        while True:
            answer = self.post("/retrieve_future", request_id=request_id)
            if answer.status_code == 200:
                return answer.json()
            answer.raise_for_status()
            time.sleep(0.5)

    def get_future_waiting(self, request_id: str) -> Any:
        """The same loop with ``wait`` in place of the sleep."""
        while True:
            answer = self.post("/retrieve_future", request_id=request_id, wait=60)
            if answer.status_code == 200:
                return answer.json()
            answer.raise_for_status()


class Bare:
    """The same requests, to the engine alone in this process."""

    def __init__(self, engine: Engine) -> None:
        self._trainer, self._renderer = engine.trainer, engine.renderer
        self._trainer.create_adapter(MODEL_ID, LoraConfig())

    def job(self, batch: Batch) -> ForwardBackwardJob:
        data = [self._renderer.render_conversation(item, train_on="auto") for item in batch]
        return ForwardBackwardJob(adapter_name=MODEL_ID, data=data, loss_fn="cross_entropy")

    def separate(self) -> list[float]:
        return [loss for batch in BATCHES for loss in self.run([self.job(batch)])]

    def merged(self) -> list[float]:
        return self.run([self.job(batch) for batch in BATCHES])

    def run(self, jobs: list[ForwardBackwardJob]) -> list[float]:
        """Mean negative log-likelihood per trained token of each job."""
        losses = []
        for job, output in zip(jobs, self._trainer.forward_backward(jobs), strict=True):
            if not isinstance(output, ForwardBackwardOutput):
                raise output
            weight = sum(float(datum.loss_fn_inputs["weights"].sum()) for datum in job.data)
            losses.append(output.loss / weight)
        return losses

    def step(self, learning_rate: float) -> None:
        self._trainer.optim_step(MODEL_ID, AdamParams(learning_rate=learning_rate))


def take_one_step(client: Client, bare: Bare) -> None:
    """Train both adapters alike, so that no loss is just the base model's."""
    rate = 1e-3
    client.forward_backward("/api/v1/forward_backward", BATCHES[0])
    step = {"learning_rate": rate}
    client.post("/api/v1/optim_step", model_id=MODEL_ID, adam_params=step).raise_for_status()
    bare.run([bare.job(BATCHES[0])])
    bare.step(rate)


def compare(
    report: Report, name: str, client: Client, keeping: Client, bare: Bare, repetitions: int
) -> None:
    """Sync, async and the engine alone, interleaved; the first round only warms up.

    ``client`` makes a connection per call, ``keeping`` keeps its one.
    """
    ways: dict[str, Callable[[], list[float]]] = {
        "engine, five separate passes": bare.separate,
        "sync, one after another": client.sync,
        "async, retrieved with wait": lambda: client.submitted_together(client.get_future_waiting),
        "async, retrieved word for word": lambda: client.submitted_together(
            client.get_future_sleeping
        ),
        "engine, one merged pass": bare.merged,
        "sync, connection kept": keeping.sync,
        "async, connection kept": lambda: keeping.submitted_together(keeping.get_future_waiting),
    }
    idle = "five calls that ask for nothing"
    rounds = []
    for _ in range(repetitions + 1):
        done = {way: timed(work) for way, work in ways.items()}
        done[idle] = timed(lambda: [loss for _ in BATCHES for loss in client.nothing()])
        rounds.append(done)
    del rounds[0]

    def ratio(slow: str, fast: str) -> list[float]:
        return [item[slow].seconds / item[fast].seconds for item in rounds]

    separate, sync, waiting, sleeping, merged, kept_sync, kept_async = ways
    for way in (*ways, idle):
        report.add(f"{name}: {way}", [item[way].seconds for item in rounds], unit="s")
    limit = ratio(separate, merged)
    gain = ratio(sync, waiting)
    report.add(f"{name}: limit of the gain", limit, unit="x")
    report.add(
        f"{name}: gain of async, retrieved with wait",
        gain,
        unit="x",
        goal=at_least(3.0) if name == "tiny" else None,
    )
    report.add(f"{name}: gain of async, retrieved word for word", ratio(sync, sleeping), unit="x")
    report.add(f"{name}: gain of async, connection kept", ratio(kept_sync, kept_async), unit="x")
    report.add(
        f"{name}: share of the limit reached",
        [one / other for one, other in zip(gain, limit, strict=True)],
        unit="x",
        goal=at_least(0.9),
    )
    report.add(
        f"{name}: gain of a server that costs nothing, with these calls",
        [
            (item[idle].seconds + item[separate].seconds)
            / (2 * item[idle].seconds + item[merged].seconds)
            for item in rounds
        ],
        unit="x",
    )
    differences = [
        max(
            abs(one - other)
            for way in ways
            for one, other in zip(item[way].losses, item[separate].losses, strict=True)
        )
        for item in rounds
    ]
    report.add(
        f"{name}: largest difference between losses", differences, unit="nats", goal=at_most(1e-5)
    )


def overhead(report: Report, name: str, client: Client, bare: Bare, pairs: int) -> None:
    """The cost of a sync call above the bare engine call, pair by pair."""
    batch = BATCHES[0]
    differences, engine, nothing = [], [], []
    for _ in range(pairs + 2):
        alone = timed(lambda: bare.run([bare.job(batch)])).seconds
        called = timed(
            lambda: [client.forward_backward("/api/v1/forward_backward", batch)["loss"]]
        ).seconds
        engine.append(1000 * alone)
        nothing.append(1000 * timed(client.nothing).seconds)
        differences.append(1000 * (called - alone))
    report.add(f"{name}: bare engine call", engine[2:], unit="ms")
    report.add(f"{name}: a call that asks for nothing", nothing[2:], unit="ms")
    report.add(
        f"{name}: a sync call above the bare engine call",
        differences[2:],
        unit="ms",
        goal=at_most(15.0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="sync against async, and the limit of the gain")
    parser.add_argument("--model", choices=("default", "tiny", "both"), default="both")
    parser.add_argument("--model-folder", type=Path, help="the default model, prepared before")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=30, help="for the overhead of a sync call")
    parser.add_argument(
        "--threads",
        default="0",
        help="TINKERAPI_NUM_THREADS, for the worker and for the engine alone",
    )
    results_option(parser)
    options = parser.parse_args()
    report = Report(
        benchmark="quickref",
        settings={
            "repetitions": options.repetitions,
            "pairs": options.pairs,
            "threads": int(options.threads),
        },
    )
    for model in ("tiny", "default") if options.model == "both" else (options.model,):
        with (
            tempfile.TemporaryDirectory(prefix="tinkerapi-bench-") as data_dir,
            served(
                model, Path(data_dir), options.model_folder, TINKERAPI_NUM_THREADS=options.threads
            ) as (server, folder),
        ):
            use_database_of(server)
            client, bare = Client(server), Bare(bare_engine(folder))
            take_one_step(client, bare)
            with requests.Session() as session:
                keeping = Client(server, session)
                compare(report, model, client, keeping, bare, options.repetitions)
            overhead(report, model, client, bare, options.pairs)
    report.finish(options.results)


if __name__ == "__main__":
    main()
