"""Training on one long datum: memory and time, with activations kept and computed twice.

Each measurement is a process of its own with the engine alone, one thread, and an adapter of rank
32. Memory is the most that the process had above what it had before the pass, and the estimate that
the worker makes before such a pass.

    python tests/benchmarks/long_sequences.py --model-folder PATH [--lengths 2000,8000]
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.report import Report, at_least, at_most, results_option
from training.engine.interface import ForwardBackwardJob
from training.types import Datum, ForwardBackwardOutput, LoraConfig

MEBIBYTE = 2**20
WAYS = {"kept": 2**60, "computed twice": 1}
"""``activation_bytes`` of each."""
MOST_KEPT_TOKENS = 8000  # more would not fit into the memory of a small machine


def measure(folder: str, dtype: str, length: int, activation_bytes: int) -> dict[str, Any]:
    """One forward_backward of one datum, after a short one."""
    import torch

    from training.engine.torch.loading import load_base_model
    from training.engine.torch.peak_memory import PeakMemory
    from training.engine.torch.trainer import TorchTrainer

    torch.set_num_threads(1)
    base_model = load_base_model(folder, dtype=dtype, device="cpu")
    trainer = TorchTrainer(base_model, activation_bytes=activation_bytes)
    trainer.create_adapter("a", LoraConfig(rank=32))
    train(trainer, 1024)  # which also measures the plan
    begin = time.process_time()
    if activation_bytes == 1:
        output = train(trainer, length)
        peak = None if output.memory is None else output.memory.peak_bytes
    else:
        with PeakMemory(base_model.device) as seen:
            output = train(trainer, length)
            peak = seen.peak_bytes()
    seconds = time.process_time() - begin
    if output.memory is None or peak is None:
        raise RuntimeError("the pass was not measured")
    return {"seconds": seconds, "peak": peak, "planned": output.memory.planned_bytes}


def train(trainer: Any, length: int) -> ForwardBackwardOutput:
    tokens = np.random.default_rng(length).integers(100, 40_000, length + 1)
    inputs = {"target_tokens": tokens[1:], "weights": np.ones(length, np.float32)}
    datum = Datum(model_input=tokens[:-1].astype(np.int32), loss_fn_inputs=inputs)
    job = ForwardBackwardJob(adapter_name="a", data=[datum], loss_fn="cross_entropy")
    (result,) = trainer.forward_backward([job])
    if not isinstance(result, ForwardBackwardOutput):
        raise result
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-folder", required=True, type=Path)
    parser.add_argument("--lengths", default="2000,8000")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    results_option(parser)
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    report = Report(
        benchmark="long_sequences",
        settings={"model": options.model_folder.name, "threads": 1, "rank": 32},
    )
    spawn = multiprocessing.get_context("spawn")
    for dtype in options.dtypes.split(","):
        for length in lengths:
            for way, activation_bytes in WAYS.items():
                if way == "kept" and length > MOST_KEPT_TOKENS:
                    continue
                with spawn.Pool(1) as pool:
                    arguments = (str(options.model_folder), dtype, length, activation_bytes)
                    found = pool.apply(measure, arguments)
                name = f"{dtype}, {length} tokens, {way}"
                goal = at_most(1536) if (length, way) == (8000, "computed twice") else None
                report.add(f"{name}: peak", [found["peak"] / MEBIBYTE], unit="MiB", goal=goal)
                ratio = found["planned"] / found["peak"]
                report.add(f"{name}: planned / peak", [ratio], unit="", goal=at_least(0.85))
                report.add(f"{name}: CPU time", [found["seconds"]], unit="s")
    report.finish(options.results)


if __name__ == "__main__":
    main()
