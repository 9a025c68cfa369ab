"""How much CPU time a forward_backward with adapters on experts takes: ours against peft's.

A random Qwen3-MoE model, adapters on its experts alone, and the same datums. peft folds A and B
into the whole stack of every layer in every pass; ours multiplies only the rows that chose an
expert. peft pads, and runs adapters one after another. Each run of one is followed by a run of the
other; the median of CPU seconds is compared, one thread. Before timing, losses and gradients are
checked to be equal.

    python -m tests.benchmarks.experts_vs_peft [--runs 5]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from tests.benchmarks.packed_vs_peft import cpu_seconds, make_datum
from tests.engine.families import save_random
from tests.engine.peft_stacks import PeftStacks
from tests.engine.reference import TinyTrainer, peft_warnings_ignored
from tests.tiny_model import VOCAB_SIZE
from training.engine.interface import ForwardBackwardJob
from training.engine.torch.loading import load_base_model
from training.types import Datum, ForwardBackwardOutput, LoraConfig

RESULTS = Path(__file__).parent / "results" / "experts_vs_peft.json"
RANK = 8
CONFIG = Qwen3MoeConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=128,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
WORKLOADS = {
    "ragged, one adapter": ((256, 128, 96, 64, 48, 32, 24, 16),),
    "4 x 128, one adapter": ((128,) * 4,),
    "8 adapters x 32 tokens": ((32,),) * 8,
}
"""By adapter, the tokens of each of its datums."""


class Peft:
    """Stock peft with one of our adapters: a padded batch for each, one after another."""

    def __init__(self, folder: str, trainer: TinyTrainer, batches: Sequence[Sequence[Datum]]):
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.layout = trainer.layout_of("0")
        self.stacks = PeftStacks(base, self.layout)
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=self.layout.config.alpha,
            target_modules=[],
            **self.stacks.peft_arguments([]),
        )
        with peft_warnings_ignored():
            self.model = peft.get_peft_model(base, config)
        self.stacks.set_weights(self.model, torch.from_numpy(trainer.adapter_state("0")["weights"]))
        self.batches = [_pad(data) for data in batches]

    def run(self) -> list[float]:
        losses = []
        for batch in self.batches:
            self.model.zero_grad()
            with peft_warnings_ignored():
                logits = self.model(
                    input_ids=batch["tokens"], attention_mask=batch["mask"], use_cache=False
                ).logits
            nll = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch["targets"].flatten(), reduction="none"
            )
            loss = (nll * batch["weights"].flatten()).sum()
            loss.backward()
            losses.append(loss.item())
        return losses

    def grad(self) -> np.ndarray[Any, Any]:
        """Of the last adapter's batch."""
        flat = torch.zeros(self.layout.num_parameters)
        self.stacks.read_grads(self.model, flat)
        return flat.numpy()


def _pad(data: Sequence[Datum]) -> dict[str, torch.Tensor]:
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


def compare(
    folder: str, lengths: Sequence[Sequence[int]], runs: int, **form: bool
) -> dict[str, Any]:
    """Median CPU seconds of both, after a check that both compute the same."""
    trainer = TinyTrainer(load_base_model(folder, dtype="float32", device="cpu"))
    config = LoraConfig(rank=RANK, alpha=16.0, train_attn=False, train_unembed=False, **form)
    batches = [
        [make_datum(n, VOCAB_SIZE, seed=100 * i + k) for k, n in enumerate(own)]
        for i, own in enumerate(lengths)
    ]
    for i in range(len(batches)):  # equal weights, so that peft needs one adapter only
        trainer.create_adapter(str(i), config)
        flat = trainer.adapter_state(str(i))["weights"]
        values = np.random.default_rng(0).normal(size=flat.shape).astype(np.float32)
        trainer.set_weights(str(i), 0.02 * values)
    jobs = [
        ForwardBackwardJob(adapter_name=str(i), data=data, loss_fn="cross_entropy")
        for i, data in enumerate(batches)
    ]

    def ours() -> list[float]:
        for i in range(len(batches)):
            trainer.drop_gradient(str(i))
        results = trainer.forward_backward(jobs)
        return [r.loss for r in results if isinstance(r, ForwardBackwardOutput)]

    theirs = Peft(folder, trainer, batches)
    np.testing.assert_allclose(ours(), theirs.run(), rtol=1e-4)
    expected, grad = theirs.grad(), trainer.grad(str(len(batches) - 1))
    difference = float(np.linalg.norm(grad - expected) / np.linalg.norm(expected))
    if difference > 1e-3:
        raise SystemExit(f"the gradients differ by {difference}")
    seconds = [(cpu_seconds(ours), cpu_seconds(theirs.run)) for _ in range(runs)]
    mine, other = (statistics.median(each) for each in zip(*seconds, strict=True))
    return {
        "cpu_seconds": round(mine, 3),
        "peft_cpu_seconds": round(other, 3),
        "ratio": round(other / mine, 2),
        "grad_relative_difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        folder = save_random(CONFIG, Path(directory))
        for name, lengths in WORKLOADS.items():
            for shares in (True, False):
                row = compare(folder, lengths, runs, share_across_experts=shares)
                rows.append({"workload": name, "share_across_experts": shares, **row})
                sys.stdout.write(f"{rows[-1]}\n")
    content = {
        "what": "median CPU seconds of one forward_backward, float32, one thread, interleaved runs",
        "model": "Qwen3-MoE: 4 layers, hidden size 256, 32 experts of size 128, 4 per token",
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {"torch": torch.__version__, "peft": peft.__version__},
        "rank": RANK,
        "runs": runs,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
