"""How much CPU time a forward_backward takes: our packed pass against peft with padding.

The same model, the same adapters, the same datums: ragged lengths and equal lengths of one
adapter, short requests of eight adapters (which peft runs one after another: it refuses a mixed
batch in training), and datums that begin alike, whose beginning our pass computes once. Each run
of one is followed by a run of the other; what is compared is the median of CPU seconds, one
thread, so that other load on the machine is out. Before timing, both losses and, in float32, all
gradients are checked to be equal.

    python -m tests.benchmarks.packed_vs_peft MODEL_FOLDER [--runs 5]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM

from training.engine.interface import ForwardBackwardJob
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import load_base_model
from training.engine.torch.trainer import TorchTrainer
from training.types import Datum, LoraConfig

RESULTS = Path(__file__).parent / "results" / "packed_vs_peft.json"
RANK = 32
LEARNT_B = 0.02
"""B starts at zero, which would make half of the gradients zero; both sides get this instead."""


@dataclass(frozen=True)
class Workload:
    name: str
    lengths: tuple[tuple[int, ...], ...]
    """Per adapter, the tokens of each of its datums."""
    shared: int = 0
    """Tokens at the beginning that all datums have in common, and are not trained on."""


WORKLOADS = (
    Workload("ragged, one adapter", ((128, 64, 48, 32, 24, 16, 12, 8),)),
    Workload("8 adapters x 16 tokens", ((16,),) * 8),
    Workload("8 x 64, one adapter", ((64,) * 8,)),
    Workload("8 samples x 32 of one prompt of 128", ((160,) * 8,), shared=128),
    Workload("8 x 80 under a system message of 32", ((80,) * 8,), shared=32),
)


def make_datum(num_tokens: int, vocab_size: int, seed: int, shared: int = 0) -> Datum:
    """Random tokens, each of them predicted from those before; the first ``shared`` are always
    the same and are not trained on."""
    beginning = np.random.default_rng(0).integers(0, vocab_size, shared)
    rest = np.random.default_rng((seed, num_tokens)).integers(0, vocab_size, num_tokens + 1)
    tokens = np.concatenate([beginning, rest[shared:]])
    weights = np.ones(num_tokens, np.float32)
    weights[: max(0, shared - 1)] = 0  # the last shared token predicts the first of its own
    return Datum(
        model_input=tokens[:-1].astype(np.int32),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
    )


class Packed:
    """Our trainer; all adapters in one call."""

    def __init__(self, base_model: BaseModel, batches: Sequence[Sequence[Datum]]) -> None:
        self.trainer = TorchTrainer(base_model)
        self.jobs = []
        for i, data in enumerate(batches):
            name = f"adapter {i}"
            self.trainer.create_adapter(name, LoraConfig(rank=RANK, alpha=RANK, seed=i))
            self._give_b(name)
            self.jobs.append(
                ForwardBackwardJob(adapter_name=name, data=data, loss_fn="cross_entropy")
            )

    def _give_b(self, name: str) -> None:
        adapter = self.trainer._adapters[name]
        generator = torch.Generator().manual_seed(0)
        for module in adapter.layout.places:
            _, b = adapter.layout.pair(adapter.weights.flat, module)
            b.normal_(0, LEARNT_B, generator=generator)

    def run(self) -> list[float]:
        for job in self.jobs:
            self.trainer._adapters[job.adapter_name].grad.flat.zero_()
        return [output.loss for output in self.trainer.forward_backward(self.jobs)]  # type: ignore[union-attr]  # benchmark data is valid

    def grad(self, i: int) -> np.ndarray[Any, Any]:
        grad: np.ndarray[Any, Any] = self.trainer.adapter_state(f"adapter {i}")["grad"]
        return grad


class Padded:
    """Stock peft: one padded batch per adapter, one adapter after another."""

    def __init__(
        self, folder: str, dtype: torch.dtype, packed: Packed, batches: Sequence[Sequence[Datum]]
    ) -> None:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.batches = [self._pad(data) for data in batches]
        self.layouts = [packed.trainer._adapters[j.adapter_name].layout for j in packed.jobs]
        config = peft.LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=list(self.layouts[0].places)
        )
        self.model = peft.get_peft_model(base, config, adapter_name="0")
        for i in range(1, len(batches)):
            self.model.add_adapter(str(i), config)
        for i, job in enumerate(packed.jobs):
            flat = packed.trainer._adapters[job.adapter_name].weights.flat
            for name in self.layouts[i].places:
                for ours, theirs in zip(
                    self.layouts[i].pair(flat, name), self._pair(i, name), strict=True
                ):
                    theirs.data.copy_(ours)

    def _pair(self, i: int, name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        module = self.model.base_model.model.get_submodule(name)
        return module.lora_A[str(i)].weight, module.lora_B[str(i)].weight

    def _pad(self, data: Sequence[Datum]) -> dict[str, torch.Tensor]:
        width = max(len(datum.model_input) for datum in data)

        def stack(arrays: Sequence[np.ndarray[Any, Any]]) -> torch.Tensor:
            return torch.stack(
                [torch.from_numpy(np.pad(array, (0, width - len(array)))) for array in arrays]
            )

        return {
            "tokens": stack([datum.model_input.astype(np.int64) for datum in data]),
            "mask": stack([np.ones(len(datum.model_input), np.int64) for datum in data]),
            "targets": stack([datum.loss_fn_inputs["target_tokens"] for datum in data]),
            "weights": stack([datum.loss_fn_inputs["weights"] for datum in data]),
        }

    def run(self) -> list[float]:
        losses = []
        self.model.zero_grad()
        for i, batch in enumerate(self.batches):
            self.model.set_adapter(str(i))
            logits = self.model(
                input_ids=batch["tokens"], attention_mask=batch["mask"], use_cache=False
            ).logits
            nll = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), batch["targets"].flatten(), reduction="none"
            )
            loss = (nll * batch["weights"].flatten()).sum()
            loss.backward()
            losses.append(loss.item())
        return losses

    def grad(self, i: int) -> np.ndarray[Any, Any]:
        flat = torch.zeros(self.layouts[i].num_parameters)
        for name in self.layouts[i].places:
            pairs = zip(self.layouts[i].pair(flat, name), self._pair(i, name), strict=True)
            for ours, theirs in pairs:
                assert theirs.grad is not None
                ours.copy_(theirs.grad)
        return flat.numpy()


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def compare(folder: str, dtype: str, workload: Workload, runs: int) -> dict[str, Any]:
    base_model = load_base_model(folder, dtype=dtype, device="cpu")
    batches = [
        [
            make_datum(n, base_model.info.vocab_size, seed=100 * i + k, shared=workload.shared)
            for k, n in enumerate(lengths)
        ]
        for i, lengths in enumerate(workload.lengths)
    ]
    packed = Packed(base_model, batches)
    padded = Padded(folder, base_model.dtype, packed, batches)
    ours, theirs = packed.run(), padded.run()  # also warms both up
    loss_difference = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    grad_difference = max(
        float(np.linalg.norm(packed.grad(i) - padded.grad(i)) / np.linalg.norm(padded.grad(i)))
        for i in range(len(batches))
    )
    if loss_difference > (1e-5 if dtype == "float32" else 1e-2):
        raise SystemExit(f"the losses differ: {ours} and {theirs}")
    if dtype == "float32" and grad_difference > 1e-3:
        raise SystemExit(f"the gradients differ by {grad_difference}")
    seconds = [(cpu_seconds(packed.run), cpu_seconds(padded.run)) for _ in range(runs)]
    packed_seconds, padded_seconds = (statistics.median(s) for s in zip(*seconds, strict=True))
    tokens = sum(sum(lengths) for lengths in workload.lengths)
    computed = sum(len(lengths) * max(lengths) for lengths in workload.lengths)
    return {
        "workload": workload.name,
        "dtype": dtype,
        "tokens": tokens,
        "tokens_with_padding": computed,
        "packed_cpu_seconds": round(packed_seconds, 3),
        "peft_cpu_seconds": round(padded_seconds, 3),
        "ratio": round(padded_seconds / packed_seconds, 2),
        "loss_relative_difference": loss_difference,
        "grad_relative_difference": grad_difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes.split(","):
        for workload in WORKLOADS:
            row = compare(options.folder, dtype, workload, options.runs)
            rows.append(row)
            print(
                f"{row['workload']:36} {dtype:9} packed {row['packed_cpu_seconds']:7.2f} s"
                f"  peft {row['peft_cpu_seconds']:7.2f} s  ratio {row['ratio']:.2f}"
                f"  (padding alone: {row['tokens_with_padding'] / row['tokens']:.2f})",
                flush=True,
            )
            store(rows, options.runs)


def store(rows: Sequence[dict[str, Any]], runs: int, results: Path = RESULTS) -> None:
    """Write the results so far; an interrupted run keeps its rows."""
    results.parent.mkdir(exist_ok=True)
    content = {
        "what": "median CPU seconds of one forward_backward, one thread, interleaved runs",
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {"torch": torch.__version__, "peft": peft.__version__},
        "rank": RANK,
        "runs": runs,
        "rows": rows,
    }
    results.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
