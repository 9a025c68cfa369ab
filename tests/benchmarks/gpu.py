"""Everything that only a GPU can tell, in one command: is it right there, and how fast is it.

- **correctness**: tiny random models of several families in float32: training, gradient, scoring,
  sampling and exports against stock transformers and peft on the CPU, which is what the test suite
  compares on a CPU.
- **the device**: its rate of products in the model's type.
- **training**: forward_backward of models with random weights in the shapes of 1B and 8B models. A
  pass over T tokens through N parameters counts as 4NT floating-point operations: forwards and
  backwards, without the gradient of the frozen weights.
- **adapters**: the same tokens under many adapters and under one.
- **memory**: the plan's estimate against the most that torch has allocated.
- **sampling**: tokens per second, and the drift: how far the log-probabilities of sampled tokens
  are from those of ``forward``.

The models are made on the device; nothing is downloaded. A part that fails does not stop the
others, but the command then ends with 1. No part begins after ``--minutes``.

    python -m tests.benchmarks.gpu [--device cuda] [--minutes 8]
    python -m tests.benchmarks.gpu --device cpu --small
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from tests.benchmarks.gpu_models import LARGE, SMALL, Shape, make
from tests.benchmarks.report import Report, at_most, results_option
from tests.engine.families import RIGHT, judge, save_random, small_config
from training.engine.interface import ForwardBackwardJob, SampleJob, SampleOutput
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.engine.torch.base_model import BaseModel
from training.engine.torch.trainer import TorchTrainer
from training.types import AdamParams, Datum, ForwardBackwardOutput, LoraConfig, SamplingParams

RANK = 32
FAMILIES = ("llama", "qwen3", "gemma3_text", "qwen3_moe", "gpt_oss")
PROMPT_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is computed."""

    shapes: Sequence[Shape]
    families: Sequence[str]
    product: int
    """Rows and columns of the matrices whose product is timed."""
    datums: int
    datum_tokens: int
    adapters: int
    long_tokens: int
    """Of the datum whose memory is measured."""
    streams: Sequence[int]
    """Sequences that are sampled at one time."""
    new_tokens: int
    repetitions: int


WHOLE = Sizes(
    shapes=LARGE,
    families=FAMILIES,
    product=8192,
    datums=8,
    datum_tokens=2048,
    adapters=8,
    long_tokens=16_384,
    streams=(1, 32, 256),
    new_tokens=64,
    repetitions=3,
)
TRIAL = Sizes(
    shapes=SMALL,
    families=FAMILIES[:1],
    product=64,
    datums=2,
    datum_tokens=32,
    adapters=2,
    long_tokens=1100,
    streams=(1, 3),
    new_tokens=4,
    repetitions=1,
)


@dataclass(kw_only=True)
class Benchmark:
    """One run."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    report: Report
    deadline: float
    failed: list[str] = field(default_factory=list)
    _rate: float = 0.0
    """Floating-point operations per second of a large product."""

    def part(self, name: str, run: Callable[[], None]) -> None:
        """Run a part; note its error, or that there is no time for it."""
        if time.monotonic() > self.deadline:
            print(f"{name}: not begun, the time is up", flush=True)
            self.failed.append(name)
            return
        print(f"{name} ...", flush=True)
        try:
            run()
        except Exception:
            traceback.print_exc()
            self.failed.append(name)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def run(self) -> None:
        self.part("the device", self.measure_device)
        for family in self.sizes.families:
            self.part(f"correctness of {family}", lambda family=family: self.judge(family))
        for shape in self.sizes.shapes:
            self.part(shape.name, lambda shape=shape: self.measure(shape))

    def seconds(self, run: Callable[[], Any]) -> float:
        """The duration of a call, until the device has done all of it."""
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure_device(self) -> None:
        size = self.sizes.product
        left, right = (
            torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2)
        )
        left @ right
        times = [self.seconds(lambda: left @ right) for _ in range(10)]
        self._rate = 2 * size**3 / min(times)
        rates = [2e-12 * size**3 / t for t in times]
        self.report.add(f"product of {size} x {size}", rates, unit="TFLOP/s")

    def judge(self, family: str) -> None:
        with TemporaryDirectory() as folder:
            save_random(small_config(family), Path(folder))
            verdict, text, differences = judge(folder, device=str(self.device))
        for name, value in differences.items():
            self.report.add(
                f"{family}, float32: largest difference in {name}",
                [value],
                unit="nats, or a share",
                goal=at_most(RIGHT),
            )
        if verdict != "right":
            raise AssertionError(f"{family} is {verdict}: {text}")

    def measure(self, shape: Shape) -> None:
        base_model = make(shape, self.device.type, self.dtype)
        for name, run in (
            ("training", self.measure_training),
            ("memory", self.measure_memory),
            ("sampling", self.measure_sampling),
        ):
            self.part(f"{shape.name}, {name}", lambda run=run: run(shape.name, base_model))

    def measure_training(self, name: str, base_model: BaseModel) -> None:
        sizes = self.sizes
        data = [_datum(sizes.datum_tokens, base_model, seed) for seed in range(sizes.datums)]
        num_tokens = sizes.datums * sizes.datum_tokens
        trainer = TorchTrainer(base_model, token_budget=num_tokens)
        names = [str(i) for i in range(sizes.adapters)]
        for adapter in names:
            _add_adapter(trainer, adapter)
        times: dict[str, list[float]] = {}
        for sharing in (names[:1], names):
            jobs = [_job(adapter, data[i :: len(sharing)]) for i, adapter in enumerate(sharing)]
            _results(trainer, jobs)  # without the choice of kernels, and the memory's first pages
            times[str(len(sharing))] = [
                self.seconds(lambda jobs=jobs: _results(trainer, jobs))
                for _ in range(sizes.repetitions)
            ]
        one, many = times["1"], times[str(len(names))]
        floats = 4 * base_model.info.num_parameters * num_tokens
        self.report.add(f"{name}: training", [num_tokens / t for t in one], unit="tokens/s")
        self.report.add(f"{name}: 4NT", [1e-12 * floats / t for t in one], unit="TFLOP/s")
        if self._rate:
            shares = [floats / t / self._rate for t in one]
            self.report.add(f"{name}: share of the product's rate", shares, unit="x")
        ratios = [several / t for several, t in zip(many, one, strict=True)]
        self.report.add(f"{name}: {len(names)} adapters against one, time", ratios, unit="x")
        steps = [
            self.seconds(lambda: trainer.optim_step(names[0], AdamParams(learning_rate=1e-5)))
            for _ in range(sizes.repetitions)
        ]
        self.report.add(f"{name}: optim_step", [1000 * t for t in steps], unit="ms")

    def measure_memory(self, name: str, base_model: BaseModel) -> None:
        for recomputes in (False, True):
            trainer = TorchTrainer(
                base_model,
                token_budget=self.sizes.long_tokens,
                activation_bytes=1 if recomputes else 2**50,
            )
            _add_adapter(trainer, "a")
            long = _job("a", [_datum(self.sizes.long_tokens, base_model, 0)])
            (result,) = _results(trainer, [long])
            memory = result.memory
            assert memory is not None
            assert memory.recomputed is recomputes
            way = "recomputed" if recomputes else "kept"
            tokens = f"{name}: {self.sizes.long_tokens} tokens, activations {way}"
            self.report.add(f"{tokens}: estimate", [memory.planned_bytes / 2**30], unit="GiB")
            if memory.peak_bytes:
                self.report.add(f"{tokens}: most seen", [memory.peak_bytes / 2**30], unit="GiB")
                share = memory.planned_bytes / memory.peak_bytes
                self.report.add(f"{tokens}: estimate over most seen", [share], unit="x")

    def measure_sampling(self, name: str, base_model: BaseModel) -> None:
        sizes = self.sizes
        trainer = TorchTrainer(base_model, token_budget=8192)
        _add_adapter(trainer, "a")
        most = max(sizes.streams)
        sampler = ContinuousSampler(
            base_model,
            ChatRenderer(base_model.tokenizer, base_model.info.vocab_size),
            cache_tokens=(most + 1) * (PROMPT_TOKENS + sizes.new_tokens + 64),
            max_sequences=most,
            prefill_chunk_tokens=2048,
        )
        sampler.publish("a", trainer.capture_adapter("a", with_optimizer=False))
        outputs: dict[str, SampleOutput] = {}
        for count in sizes.streams:
            rates = []
            for repetition in range(sizes.repetitions):
                jobs = {
                    f"{repetition} {i}": _sample_job(base_model, (count, repetition, i), sizes)
                    for i in range(count)
                }
                duration = self.seconds(lambda jobs=jobs: outputs.update(_sampled(sampler, jobs)))
                rates.append(count * sizes.new_tokens / duration)
            what = f"{count} prompts of {PROMPT_TOKENS} tokens, {sizes.new_tokens} sampled each"
            self.report.add(f"{name}: {what}, prefill included", rates, unit="tokens/s")
        jobs = {str(i): _sample_job(base_model, (0, 0, i), sizes) for i in range(most)}
        drift = _drift(trainer, base_model, jobs, _sampled(sampler, jobs))
        self.report.add(f"{name}: sampled against forward, each token", drift, unit="nats")


def _add_adapter(trainer: TorchTrainer, name: str) -> None:
    """An adapter whose B is not zero."""
    trainer.create_adapter(name, LoraConfig(rank=RANK, alpha=RANK))
    adapter = trainer._adapters[name]
    for module in adapter.layout.places:
        _, b = adapter.layout.pair(adapter.weights.flat, module)
        b.copy_(torch.randn(b.shape, generator=torch.Generator().manual_seed(0)) * 0.01)


def _tokens(base_model: BaseModel, count: int, seed: Any) -> Any:
    return np.random.default_rng(seed).integers(3, base_model.info.vocab_size, count)


def _datum(num_tokens: int, base_model: BaseModel, seed: int) -> Datum:
    tokens = _tokens(base_model, num_tokens + 1, seed)
    weights = np.ones(num_tokens, np.float32)
    return Datum(
        model_input=tokens[:-1].astype(np.int32),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
    )


def _job(adapter: str, data: Sequence[Datum], *, trains: bool = True) -> ForwardBackwardJob:
    return ForwardBackwardJob(
        adapter_name=adapter, data=data, loss_fn="cross_entropy", forward_only=not trains
    )


def _results(
    trainer: TorchTrainer, jobs: Sequence[ForwardBackwardJob]
) -> list[ForwardBackwardOutput]:
    results = []
    for result in trainer.forward_backward(jobs):
        if not isinstance(result, ForwardBackwardOutput):
            raise result
        results.append(result)
    return results


def _sample_job(base_model: BaseModel, seed: tuple[int, int, int], sizes: Sizes) -> SampleJob:
    return SampleJob(
        prompt=_tokens(base_model, PROMPT_TOKENS, seed).astype(np.int32),
        version="a",
        sampling_params=SamplingParams(max_tokens=sizes.new_tokens, seed=seed[2], stop=()),
    )


def _sampled(sampler: ContinuousSampler, jobs: dict[str, SampleJob]) -> dict[str, SampleOutput]:
    for key, job in jobs.items():
        sampler.submit(key, job)
    outputs: dict[str, SampleOutput] = {}
    while sampler.active:
        for key, output in sampler.poll(60).items():
            if not isinstance(output, SampleOutput):
                raise output
            outputs[key] = output
    return outputs


def _drift(
    trainer: TorchTrainer,
    base_model: BaseModel,
    jobs: dict[str, SampleJob],
    outputs: dict[str, SampleOutput],
) -> list[float]:
    """The distance of each sampled token's log-probability from that of ``forward``, in nats."""
    drift: list[float] = []
    for key, job in jobs.items():
        (sequence,) = outputs[key].sequences
        tokens = np.array([*job.prompt, *sequence.tokens])
        weights = np.ones(len(tokens) - 1, np.float32)
        datum = Datum(
            model_input=tokens[:-1].astype(np.int32),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
        )
        (result,) = _results(trainer, [_job("a", [datum], trains=False)])
        own = result.logprobs[0][len(job.prompt) - 1 :]
        drift += np.abs(own - np.array(sequence.logprobs)).tolist()
    return drift


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the benchmark")
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins after them")
    results_option(parser)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here; try the benchmark itself with --device cpu --small.")
        return 1
    device = torch.device(options.device)
    settings = {"device": "cpu", "small": options.small}
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16
        settings["device"] = torch.cuda.get_device_name(device)
    benchmark = Benchmark(
        device=device,
        dtype=dtype,
        sizes=TRIAL if options.small else WHOLE,
        report=Report(benchmark="gpu", settings={**settings, "dtype": str(dtype)}),
        deadline=time.monotonic() + 60 * options.minutes,
    )
    benchmark.run()
    benchmark.report.finish(options.results)
    if benchmark.failed:
        print("failed:", ", ".join(benchmark.failed))
    return 1 if benchmark.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
