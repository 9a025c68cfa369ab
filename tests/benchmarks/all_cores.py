"""A whole server against a person's own script that uses every core, on an idle machine and beside
a process that takes one core all the time.

The script is a plain peft loop (padded batches, AdamW) or transformers' ``generate``, with torch's
threads on all cores. Two servers take turns with it: one whose worker has one thread, and one that
uses idle cores (``TINKERAPI_NUM_THREADS``). Both are asked through the official SDK. A figure is a
ratio of wall times, of each the best of several; the machine must be idle otherwise.

    python -m tests.benchmarks.all_cores MODEL_FOLDER [--turns 3] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.report import Goal, Report, at_least, results_option
from tests.benchmarks.served_model import served
from tests.server import Server

RANK = 32
VOCAB = 40_000
"""Tokens are drawn from fewer than the model's, which are words and parts of words."""
SETTLE_SECONDS = 2.0
"""After a load has begun or ended, that of another way included; a worker measures twice a
second."""


@dataclass(frozen=True)
class Training:
    """A step on datums of these lengths, which share their first tokens."""

    name: str
    lengths: tuple[int, ...]
    shared: int = 0
    goal: float | None = None


@dataclass(frozen=True)
class Sampling:
    """Samples of prompts of so many tokens."""

    name: str
    prompts: int
    samples: int
    max_tokens: int
    prompt_tokens: int = 64
    goal: float | None = None


RAGGED = tuple(range(16, 257, 16))
WORK: tuple[Training | Sampling, ...] = (
    Training("8 datums of 128 tokens", (128,) * 8, goal=1.4),
    Training("32 datums of 32", (32,) * 32, goal=1.2),
    Training("one datum of 512", (512,), goal=1.2),
    Training("16 ragged datums of 16 to 256", RAGGED, goal=3.0),
    Training("16 answers of 64 to a prompt of 192", (256,) * 16, shared=192, goal=5.0),
    Sampling("one sample of 64 tokens", 1, 1, 64, goal=1.0),
    Sampling("8 prompts, 32 tokens each", 8, 1, 32, goal=1.5),
    Sampling("16 samples of 32 of one prompt", 1, 16, 32, goal=3.5),
)


def sequences(work: Training) -> list[list[int]]:
    """One token more than each length."""
    beginning = np.random.default_rng(0).integers(3, VOCAB, work.shared).tolist()
    return [
        beginning + np.random.default_rng(i).integers(3, VOCAB, n + 1 - work.shared).tolist()
        for i, n in enumerate(work.lengths, 1)
    ]


def weights_of(work: Training, length: int) -> list[float]:
    before = max(0, work.shared - 1)  # the prompt's last token predicts the answer's first
    return [0.0] * before + [1.0] * (length - before)


def prompts_of(work: Sampling) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(3, VOCAB, work.prompt_tokens).tolist() for _ in range(work.prompts)]


class OwnScript:
    """Stock transformers and peft."""

    def __init__(self, folder: str, dtype: str, num_threads: int) -> None:
        import peft
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(num_threads)
        self._torch = torch
        self._base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
        self._model = peft.get_peft_model(self._base, config)
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def run(self, work: Training | Sampling) -> None:
        if isinstance(work, Training):
            self._train(work)
        else:
            self._sample(work)

    def _train(self, work: Training) -> None:
        torch = self._torch
        width = max(work.lengths)
        tokens = torch.zeros(len(work.lengths), width + 1, dtype=torch.int64)
        weights = torch.zeros(len(work.lengths), width)
        for i, row in enumerate(sequences(work)):
            tokens[i, : len(row)] = torch.tensor(row)
            weights[i, : len(row) - 1] = torch.tensor(weights_of(work, len(row) - 1))
        mask = (torch.arange(width) < torch.tensor(work.lengths)[:, None]).long()
        logits = self._model(input_ids=tokens[:, :-1], attention_mask=mask, use_cache=False).logits
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
        )
        (nll * weights.flatten()).sum().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _sample(self, work: Sampling) -> None:
        torch = self._torch
        prompts = torch.tensor(prompts_of(work))
        with torch.no_grad():
            self._plain.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                num_return_sequences=work.samples,
                min_new_tokens=work.max_tokens,
                max_new_tokens=work.max_tokens,
                pad_token_id=0,
            )


def _serve_script(connection: Connection, folder: str, dtype: str, num_threads: int) -> None:
    """Do what is asked, and answer with the seconds; torch's threads idle meanwhile."""
    script = OwnScript(folder, dtype, num_threads)
    connection.send(0.0)
    while True:
        try:
            work = connection.recv()
        except EOFError:
            return
        begin = time.perf_counter()
        script.run(work)
        connection.send(time.perf_counter() - begin)


@contextmanager
def own_script(
    folder: Path, dtype: str, *, num_threads: int = os.cpu_count() or 1
) -> Iterator[Callable[[Training | Sampling], float]]:
    """Seconds of work by the script, which has a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve_script, args=(theirs, str(folder), dtype, num_threads), daemon=True
    )
    process.start()
    ours.recv()

    def seconds(work: Training | Sampling) -> float:
        ours.send(work)
        taken: float = ours.recv()
        return taken

    yield seconds
    process.kill()
    process.join()


class Sdk:
    """The same through the official SDK."""

    def __init__(self, server: Server, base_model: str) -> None:
        os.environ.setdefault("TINKER_API_KEY", "tml-local")
        import tinker

        [line] = [line for line in server.log().splitlines() if line.startswith("api key")]
        service = tinker.ServiceClient(base_url=server.url, api_key=line.split()[2])
        self._types: Any = tinker.types
        self._trainer = service.create_lora_training_client(
            base_model=base_model, rank=RANK, train_unembed=False
        )
        self._sampler = service.create_sampling_client(base_model=base_model)

    def seconds(self, work: Training | Sampling) -> float:
        """Wall seconds; of samples that end early, as if they had not."""
        if isinstance(work, Training):
            data = [self._datum(work, row) for row in sequences(work)]
            begin = time.perf_counter()
            passed = self._trainer.forward_backward(data, "cross_entropy")
            stepped = self._trainer.optim_step(self._types.AdamParams(learning_rate=1e-5))
            passed.result()
            stepped.result()
            return time.perf_counter() - begin
        params = self._types.SamplingParams(max_tokens=work.max_tokens, temperature=1.0, seed=1)
        prompts = [self._types.ModelInput.from_ints(tokens) for tokens in prompts_of(work)]
        begin = time.perf_counter()
        futures = [
            self._sampler.sample(prompt=p, num_samples=work.samples, sampling_params=params)
            for p in prompts
        ]
        sampled = sum(len(s.tokens) for f in futures for s in f.result().sequences)
        taken = time.perf_counter() - begin
        return taken * work.prompts * work.samples * work.max_tokens / sampled

    def _datum(self, work: Training, row: Sequence[int]) -> Any:
        return self._types.Datum(
            model_input=self._types.ModelInput.from_ints(list(row[:-1])),
            loss_fn_inputs={
                "target_tokens": list(row[1:]),
                "weights": weights_of(work, len(row) - 1),
            },
        )


@contextmanager
def hog() -> Iterator[None]:
    """A process that takes one core all the time."""
    process = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
    process.start()
    time.sleep(SETTLE_SECONDS)
    yield
    process.kill()
    process.join()
    time.sleep(SETTLE_SECONDS)


def _spin() -> None:
    while True:
        pass


def compare(
    report: Report,
    where: str,
    ways: Mapping[str, Callable[[Training | Sampling], float]],
    work: Sequence[Training | Sampling],
    turns: int,
    *,
    has_goals: bool,
) -> None:
    script, one, all_cores = ways
    for item in work:
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(turns):
            for way, seconds in ways.items():
                time.sleep(SETTLE_SECONDS)
                taken[way].append(seconds(item))
        best = {way: min(values) for way, values in taken.items()}
        goal: Goal | None = at_least(item.goal) if has_goals and item.goal else None
        stock = "peft" if isinstance(item, Training) else "generate"
        name = f"{where}: {item.name}"
        report.add(f"{name}: {stock}", taken[script], unit="s")
        report.add(f"{name}: {stock} over one thread", [best[script] / best[one]], unit="x")
        report.add(
            f"{name}: {stock} over idle cores",
            [best[script] / best[all_cores]],
            unit="x",
            goal=goal,
        )
        report.add(
            f"{name}: one thread over idle cores",
            [best[one] / best[all_cores]],
            unit="x",
            goal=None if has_goals else at_least(0.95),
        )
        print(
            name, {way: [round(v, 2) for v in values] for way, values in taken.items()}, flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="a whole server against a script on all cores")
    parser.add_argument("model_folder", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--threads", default="auto", help="of the second server; a number beside other load"
    )
    parser.add_argument("--label", default="idle machine", help="of the figures without the hog")
    parser.add_argument("--work", default="", help="numbers of workloads, comma separated")
    parser.add_argument("--only", choices=("idle", "hog", "both"), default="both")
    results_option(parser)
    options = parser.parse_args()
    numbers = [int(n) for n in options.work.split(",") if n] or range(len(WORK))
    work = [WORK[n] for n in numbers]
    report = Report(
        benchmark="all_cores",
        settings={
            "model": options.model_folder.name,
            "dtype": options.dtype,
            "rank": RANK,
            "turns": options.turns,
            "threads": options.threads,
        },
    )
    with ExitStack() as stack:

        def sdk(threads: str) -> Sdk:
            data_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="tinkerapi-bench-"))
            settings = {"TINKERAPI_NUM_THREADS": threads, "TINKERAPI_DTYPE": options.dtype}
            server, folder = stack.enter_context(
                served("default", Path(data_dir), options.model_folder, **settings)
            )
            return Sdk(server, folder.name)

        script = stack.enter_context(own_script(options.model_folder, options.dtype))
        one, all_cores = sdk("1"), sdk(options.threads)
        ways = {"script": script, "one": one.seconds, "all": all_cores.seconds}
        for item in work:  # warms caches and allocators
            for seconds in ways.values():
                seconds(item)
        if options.only != "hog":
            compare(report, options.label, ways, work, options.turns, has_goals=True)
        if options.only != "idle":
            with hog():
                compare(report, "beside one busy core", ways, work, options.turns, has_goals=False)
    report.finish(options.results)


if __name__ == "__main__":
    main()
