"""How far the log-probability of a sampled token is from that of scoring and of training.

One process with the engine alone and an adapter whose weights are not zero. It samples groups of
answers at temperature 1, trains on them with ``importance_sampling`` in the same layout as a server
does, and scores them as prompts. Compared are the numbers of each sampled token; a difference of 0
is equality of all bits.

    python tests/benchmarks/on_policy.py --model-folder PATH [--tokens 10000]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.report import Report, at_most, results_option
from training.engine.interface import ForwardBackwardJob, SampleJob, SampleOutput
from training.types import Datum, ForwardBackwardOutput, LoraConfig, SamplingParams

GROUP = 8  # answers of each prompt
ANSWER_TOKENS = 250
RANK = 32
LEARNT_B = 0.02


def differences(folder: str, dtype: str, num_tokens: int) -> tuple[list[float], list[float]]:
    """Of each sampled token, from the trainer's and from the scored log-probability."""
    import torch

    from training.engine.renderer.chat_renderer import ChatRenderer
    from training.engine.sampler.continuous_batching import ContinuousSampler
    from training.engine.torch.loading import load_base_model
    from training.engine.torch.trainer import TorchTrainer

    torch.set_num_threads(1)
    base_model = load_base_model(folder, device="cpu", dtype=dtype)
    trainer = TorchTrainer(base_model)
    trainer.create_adapter("a", LoraConfig(rank=RANK))
    adapter = trainer._adapters["a"]
    for module in adapter.layout.places:
        _, b = adapter.layout.pair(adapter.weights.flat, module)
        b.normal_(0, LEARNT_B, generator=torch.Generator().manual_seed(0))
    sampler = ContinuousSampler(
        base_model, ChatRenderer(base_model.tokenizer, base_model.info.vocab_size)
    )
    sampler.publish("a", trainer.capture_adapter("a", with_optimizer=False))
    of_trainer: list[float] = []
    of_scores: list[float] = []
    while len(of_trainer) < num_tokens:
        step = len(of_trainer)
        rng = np.random.default_rng(step)
        prompt = rng.integers(100, base_model.info.vocab_size, rng.integers(20, 100))
        params = SamplingParams(max_tokens=ANSWER_TOKENS, seed=step, stop=())
        job = SampleJob(
            prompt=prompt.astype(np.int32),
            sampling_params=params,
            num_samples=GROUP,
            version="a",
        )
        sequences = sample(sampler, {"group": job})["group"].sequences
        tokens = [np.asarray([*prompt, *each.tokens], np.int32) for each in sequences]
        sampled = [np.asarray(each.logprobs, np.float32) for each in sequences]
        zeros = np.zeros(len(prompt) - 1, np.float32)
        data = [
            Datum(
                model_input=each[:-1],
                loss_fn_inputs={
                    "target_tokens": each[1:].astype(np.int64),
                    "logprobs": np.concatenate([zeros, own]),
                    "advantages": np.concatenate([zeros, np.ones_like(own)]),
                },
            )
            for each, own in zip(tokens, sampled, strict=True)
        ]
        (result,) = trainer.forward_backward(
            [ForwardBackwardJob(adapter_name="a", data=data, loss_fn="importance_sampling")]
        )
        if not isinstance(result, ForwardBackwardOutput):
            raise result
        scoring = {
            str(n): SampleJob(
                prompt=each,
                sampling_params=SamplingParams(max_tokens=0, seed=0, stop=()),
                num_samples=1,
                version="a",
                prompt_logprobs=True,
            )
            for n, each in enumerate(tokens)
        }
        scored = sample(sampler, scoring)
        for n, own in enumerate(sampled):
            of_trainer += np.abs(result.logprobs[n][len(zeros) :] - own).tolist()
            scores = np.asarray(scored[str(n)].prompt_logprobs, np.float32)[len(prompt) :]
            of_scores += np.abs(scores - own).tolist()
    return of_trainer, of_scores


def sample(sampler: object, jobs: dict[str, SampleJob]) -> dict[str, SampleOutput]:
    for key, job in jobs.items():
        sampler.submit(key, job)  # type: ignore[attr-defined]  # torch is imported late
    results: dict[str, SampleOutput] = {}
    while sampler.active:  # type: ignore[attr-defined]
        for key, output in sampler.poll(0).items():  # type: ignore[attr-defined]
            if isinstance(output, Exception):
                raise output
            results[key] = output
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-folder", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    results_option(parser)
    options = parser.parse_args()
    report = Report(
        benchmark="on_policy",
        settings={"model": options.model_folder.name, "threads": 1, "rank": RANK},
    )
    for dtype in options.dtypes.split(","):
        found = differences(str(options.model_folder), dtype, options.tokens)
        for name, values in zip(("trained", "scored"), found, strict=True):
            what = f"{dtype}, {len(values)} tokens, sampled against {name} log-probability"
            report.add(f"{what}: largest difference", [max(values)], unit="nats", goal=at_most(0))
            different = sum(value != 0 for value in values)
            report.add(f"{what}: tokens that differ", [different], unit="", goal=at_most(0))
    report.finish(options.results)


if __name__ == "__main__":
    main()
